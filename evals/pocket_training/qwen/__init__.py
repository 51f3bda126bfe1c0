"""The recipe of pocket-qwen, which begins with the weights of pocket-llava."""
