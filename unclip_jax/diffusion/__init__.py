"""The maths of Gaussian diffusion. It knows nothing of networks, files or devices."""
