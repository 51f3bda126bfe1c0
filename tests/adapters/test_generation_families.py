"""Promise 3 on every family: each way of generating, compared with the masked model or with plain generation."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from _families import BUILDERS, batch_of, family
from masked_reference import masked_by, relative_error
from packaging.version import Version

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.seams import cache_argument, cache_in

FAMILIES = list(BUILDERS)
NEWER = Version(transformers.__version__) >= Version("5.23")
PLANS = {
    "input": "random@9",
    "layers": [{"at": "input", "prune": "random", "keep": 20}, {"at": "layer:2", "prune": "random", "keep": 6}],
}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_plan = pytest.mark.parametrize("plan", list(PLANS))


@pytest.mark.parametrize("plan", [*PLANS, "fastv@6", "transprune@6", "pyramiddrop@6", "todre@9"])
@every_family
def test_assisted_decoding_with_an_unpruned_draft(name, plan):
    """What the draft proposes comes with the prompt, and is none of it to methods that look at the text."""
    model, draft, batch = family(name), BUILDERS[name](seed=3), batch_of(name, "one_left")
    with tokenprune.applied(model, PLANS.get(plan, plan)), torch.no_grad():
        plain = model.generate(**batch, max_new_tokens=10, do_sample=False)
        assisted = model.generate(**batch, max_new_tokens=10, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("plan", [*PLANS, "transprune@6"])
@every_family
def test_a_second_turn_of_text_on_the_returned_cache(name, plan):
    """The cache goes on as if the first turn's answer and the new words had been generated after the prompt."""
    model, batch = family(name), batch_of(name, "one_left")
    more = torch.randint(8, 64, (1, 5), generator=torch.Generator().manual_seed(4))
    with tokenprune.applied(model, PLANS.get(plan, plan)) as handle, torch.no_grad():
        first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache = cache_in(first)
        held = [layer.keys.shape[2] for layer in cache.layers]
        ids = torch.cat([first.sequences, more], dim=1)
        again = copy.deepcopy(cache)
        second = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=5,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert [layer.keys.shape[2] - n for layer, n in zip(cache_in(second).layers, held)] == [1 + 5 + 4] * 4
        # one by one on a copy, no generate
        token, logits = ids[:, first.sequences.shape[1] - 1 :], None
        length = first.sequences.shape[1] - 1
        for i in range(token.shape[1]):
            # with a mask and no ids, Qwen counts positions for the whole conversation, in any case
            given = {"attention_mask": torch.ones(1, length + i + 1, dtype=torch.int64)}
            if adapter_for(model).mrope:
                given = {}
            else:
                given["position_ids"] = torch.tensor([[length + i]])
            logits = model(input_ids=token[:, i : i + 1], **cache_argument(again), **given).logits[:, -1]
        kept = handle.kept
    assert relative_error(second.logits[0], logits) < 1e-5
    assert len(kept) == 1


@every_family
def test_inputs_embeds_equal_input_ids(name):
    model, batch = family(name), batch_of(name, "one_left")
    if adapter_for(model).mrope:
        pytest.skip("M-RoPE ids follow from input_ids: transformers itself counts plain positions without them")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    with tokenprune.applied(model, "vtc_cls@9"), torch.no_grad():
        by_ids = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, -5:]
        by_embeds = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=5, do_sample=False)
    assert torch.equal(by_embeds, by_ids)


@every_family
def test_labels_give_the_masked_models_loss_and_gradients_flow(name):
    model, batch = family(name), batch_of(name, "one_left")
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    with tokenprune.applied(model, "random@9") as handle:
        model.zero_grad()
        output = model(**batch, labels=labels)
        output.loss.backward()
        kept, adapter = handle.kept, handle.adapter
        policy = handle.method.positions
    gradients = [p.grad for p in adapter.projector.parameters() if p.grad is not None]
    assert gradients and any(float(gradient.abs().max()) > 0 for gradient in gradients)
    model.zero_grad()
    masked = masked_by(adapter, batch, kept, policy)
    with torch.no_grad():
        logits = model.lm_head(masked.hidden())
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert relative_error(output.loss.detach(), truth) < 1e-5


@every_family
def test_a_static_cache_is_refused_before_the_prompt_runs(name):
    model, batch = family(name), batch_of(name, "one_left")
    with (
        tokenprune.applied(model, "random@9"),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"static cache|Static caches|4-D form"),
    ):
        model.generate(**batch, max_new_tokens=3, do_sample=False, cache_implementation="static")


@every_family
@pytest.mark.skipif(not NEWER, reason="older transformers get chunks of prompts with pictures wrong, pruned or not")
def test_a_prompt_in_chunks_is_refused_with_a_sentence(name):
    model, batch = family(name), batch_of(name, "one_left")
    with tokenprune.applied(model, "random@9"), torch.no_grad(), pytest.raises(ValueError, match=r"prefill_chunk_size"):
        model.generate(**batch, max_new_tokens=3, do_sample=False, prefill_chunk_size=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_family
def test_half_precision_runs_and_stays_near_full_precision(name, dtype):
    """The same random tokens stay, so that only rounding differs."""
    full, batch = family(name), batch_of(name, "one_left")
    half = copy.deepcopy(full).to(dtype)
    low = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        with tokenprune.applied(half, PLANS["layers"]) as handle:
            found, kept = half(**low).logits[:, -1].float(), handle.kept
        with tokenprune.applied(full, PLANS["layers"]) as handle:
            # bits of the pixels seed the choice, so it is made on the rounded ones
            rounded = {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in batch.items()}
            truth, expected = full(**rounded).logits[:, -1], handle.kept
        stock = relative_error(half(**low).logits[:, -1].float(), full(**rounded).logits[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(kept[0], expected[0]))
    allowed = 0.12 if dtype == torch.bfloat16 else 0.02
    off = relative_error(found, truth)
    if stock > 0.2 or stock > allowed <= off:
        pytest.skip(f"the stock model itself is {stock:.2f} away from full precision in this version")
    assert off < allowed


@every_family
def test_weights_offloaded_to_the_cpu_by_accelerate(name):
    from accelerate import cpu_offload

    plain, batch = family(name), batch_of(name, "one_left")
    model = copy.deepcopy(plain)
    offloaded = copy.deepcopy(plain)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    generates, forwards = works(offloaded.generate, batch), works(offloaded, batch)
    if not forwards:  # SigLIP's pooling head: not even a forward call of the stock model gets through
        pytest.skip("the stock model fails on the meta device as well")

    def run(net):
        with torch.no_grad(), tokenprune.applied(net, PLANS["layers"]):
            return net.generate(**batch, max_new_tokens=5, do_sample=False) if generates else net(**batch).logits

    truth = run(plain)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model), truth)


def works(call, batch) -> bool:
    """Whether a stock call gets through; some find their own parameters on the meta device when weights are away."""
    try:
        with torch.no_grad():
            call(**batch)
    except (NotImplementedError, RuntimeError) as error:
        assert "meta" in str(error)
        return False
    return True


@pytest.mark.slow
def test_a_compiled_forward_generates_the_same():
    """What is compiled is the model as it is applied: our hooks run between its graphs."""
    model, batch = BUILDERS["llava"](), batch_of("llava", "one_left")
    with tokenprune.applied(model, PLANS["layers"]), torch.no_grad():
        truth = model.generate(**batch, max_new_tokens=3, do_sample=False)
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), truth)
        del model.forward
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_quantized_cache_holds_a_pruned_prompt(name):
    pytest.importorskip("optimum.quanto")
    model, batch = family(name), batch_of(name, "one_left")
    with tokenprune.applied(model, PLANS["layers"]), torch.no_grad():
        found = model.generate(
            **batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True,
            cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4, "q_group_size": 16},
        )  # fmt: skip
        plain = model.generate(
            **batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert cache_in(found).get_seq_length() == batch["input_ids"].shape[1] + 4
    assert torch.equal(found.logits[0], plain.logits[0]), "the prompt itself sees unquantized keys"
    assert relative_error(found.logits[1], plain.logits[1]) < 0.5
