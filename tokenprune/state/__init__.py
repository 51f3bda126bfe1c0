"""What is known of one batch of prompts while it runs, and what travels on with the KV cache.

In: the visuals of a prompt, selections. Out: where tokens stand, which are kept, what moves them; the state of a call.
"""
