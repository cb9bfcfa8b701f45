"""The training loop: steps, generations, evolution, and the state that a run goes on from."""
