"""What belongs to a denoiser: VAE, text encoders and tokenizers, found beside it and told apart."""
