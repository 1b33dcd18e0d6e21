"""The mathematics of the diffusion process, in float64 tables and without Lightning."""
