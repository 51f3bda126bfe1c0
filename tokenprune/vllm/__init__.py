"""vLLM: the same methods inside its workers, with a method and a budget for each request.

In: what an engine and a request say (`--mm-processor-kwargs '{"tokenprune": "divprune@64"}'`), and vLLM's own models,
whose towers are read and whose visual tokens are cut before they reach the decoder.
Out: prompts with fewer placeholders, and as many embeddings. Nothing here is imported unless vLLM asks for it: `plugin`
is its entry point in the group vllm.general_plugins, `seams` says which releases of vLLM it fits.
"""
