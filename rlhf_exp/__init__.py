"""PPO-RLHF on transformers one can look inside. Importing the package imports nothing heavy."""
