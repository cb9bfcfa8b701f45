"""What a joint model is as stored tensors: their keys, precisions and sizes."""
