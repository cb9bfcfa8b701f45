"""Sums and means over processes keep the precision of what is summed."""

import torch

from surgery.training.loop.processes import Processes
from surgery.util.collectives import add_up, average, in_one_call


def test_tensors_of_several_shapes_and_dtypes_are_changed_in_one_call():
    tensors = [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(()), torch.ones(1, 4).t()]
    seen = []

    def change(flat):
        seen.append(flat)
        return flat * torch.arange(1.0, len(flat) + 1)

    in_one_call(tensors, change)
    assert len(seen) == 1 and seen[0].dtype == torch.float32
    assert tensors[0].flatten().tolist() == [1, 2, 3, 4, 5, 6] and tensors[0].dtype == torch.bfloat16
    assert tensors[1] == 7 and tensors[2].flatten().tolist() == [8, 9, 10, 11]
    in_one_call([], change)
    assert len(seen) == 1


def test_one_process_keeps_what_it_has():
    one = torch.ones(2)
    add_up([one])
    average([one], weight=3.0)
    assert one.tolist() == [1, 1]


class Two:
    """Stands for two processes with the same gradients."""

    num_processes = 2

    def reduce(self, flat, how):
        assert how == "mean"
        return flat


def test_gradients_in_double_precision_stay_so():
    exact = 1 + 2.0**-40
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    parameter.grad = torch.full((3,), exact, dtype=torch.float64)
    Processes(Two()).average([parameter, torch.nn.Parameter(torch.zeros(1))])
    assert parameter.grad.tolist() == [exact] * 3
