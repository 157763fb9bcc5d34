"""The kinds of policy, by what is trained: all parameters, LoRA's factors, a bilinear guide."""
