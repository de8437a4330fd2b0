"""What a step learns: noise, timesteps, targets and weights of diffusion and flow matching."""
