"""bs_jax: change the batch size; learning rate, weight decay, betas and the rest follow."""
