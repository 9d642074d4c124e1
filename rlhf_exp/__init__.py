"""PPO-RLHF for interpretability research. Importing the package imports nothing heavy."""
