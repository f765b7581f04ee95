"""What an adapter means: which tensors of a base it changes, how, and the proof that it was done."""
