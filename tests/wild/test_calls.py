"""Calls that come in another way than generate() makes them: right, or refused with a sentence."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import IMAGE, prompts, tiny_llava
from masked_reference import masked_by, relative_error
from transformers import LogitsProcessor, LogitsProcessorList

import tokenprune
from tokenprune.wrappers import unwrap

VAR = "var(channels=[1, 2], tau=0.1)"

# --- several samples in one row -----------------------------------------------------------------------------------


def packed(batch: dict[str, Any], length: int) -> torch.Tensor:
    """Positions that begin anew in the middle of the row."""
    total = batch["input_ids"].shape[1]
    return torch.cat([torch.arange(length), torch.arange(total - length)])[None]


@pytest.mark.parametrize(
    "method", ["uniform@9", "uniform(positions=keep)@9", "fastv@9", "var(channels=[1, 2], tau=0.1)"]
)
@pytest.mark.parametrize("mask", ["none", "ones"])
def test_positions_that_begin_anew_are_refused(method: str, mask: str) -> None:
    model, batch = tiny_llava(), prompts([2])
    del batch["attention_mask"]
    more = {} if mask == "none" else {"attention_mask": torch.ones_like(batch["input_ids"])}
    with tokenprune.applied(model, method), torch.no_grad():
        with pytest.raises(ValueError, match=r"several samples.*position_ids that go back.*packing=False"):
            model(**batch, **more, position_ids=packed(batch, 50))
        model(**batch, **more, position_ids=torch.arange(batch["input_ids"].shape[1])[None])


@pytest.mark.parametrize("rows", [3, 4])
def test_packed_rows_of_mrope_are_refused(rows: int) -> None:
    model, batch = family("qwen2_5_vl"), batch_of("qwen2_5_vl", "one_left")
    with tokenprune.applied(model, "uniform@9"), torch.no_grad():
        for half in (10, 37):
            with pytest.raises(ValueError, match="several samples"):
                model(**batch, position_ids=packed(batch, half).expand(rows, 1, -1))
        own, _ = model.model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], None, batch["attention_mask"]
        )
        model(**batch, position_ids=own)


def test_other_ways_to_say_packed() -> None:
    model, batch = tiny_llava(), prompts([2])
    numbered = torch.ones_like(batch["input_ids"])
    numbered[:, 50:] = 2
    with tokenprune.applied(model, "uniform@9"), torch.no_grad():
        with pytest.raises(ValueError, match="an attention_mask that numbers samples"):
            model(**{**batch, "attention_mask": numbered})
        with pytest.raises(ValueError, match="cu_seq_lens_q"):
            model(**batch, cu_seq_lens_q=torch.tensor([0, 50, numbered.shape[1]], dtype=torch.int32))


@pytest.mark.parametrize("layout", ["ragged_left", "ragged_right"])
def test_padding_is_not_taken_for_packing(layout: str) -> None:
    model, batch = family("llava"), batch_of("llava", layout)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with tokenprune.applied(model, "uniform@9"), torch.no_grad():
        model(**batch, position_ids=positions)


# --- what was kept, and when --------------------------------------------------------------------------------------


def test_guidance_leaves_the_report_of_the_prompt_with_pictures() -> None:
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "uniform@9") as handle, torch.no_grad():
        with handle.watch() as passes:
            model.generate(**batch, max_new_tokens=3, do_sample=False, guidance_scale=1.5)
        assert [len(tokens) for tokens in handle.kept[0]] == [9] and handle.report().kept_tokens == 9
        assert [len(view.kept[0]) for view in passes] == [1, 0]
        model(input_ids=torch.tensor([[9, 10, 11]]))  # a prompt of its own
        assert handle.kept == [[]]


class Asks(LogitsProcessor):
    """Calls the model on something longer than the prompt, while an answer is written."""

    def __init__(self, model: Any, batch: dict[str, Any]) -> None:
        self.model, self.batch = model, batch
        self.kept: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        output = self.model(**self.batch)
        self.kept.append(output.logits[:, -1])
        return scores


@pytest.mark.parametrize("method", ["fastv@9", "pyramiddrop@9", "transprune@9", "todre@9", VAR])
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_a_processor_that_calls_the_model_on_a_longer_prompt(method: str, how: dict[str, Any]) -> None:
    model, batch, longer = tiny_llava(), prompts([1]), prompts([2], seed=3)
    with tokenprune.applied(model, method), torch.no_grad():
        alone, plain = model(**longer).logits[:, -1], model.generate(**batch, max_new_tokens=4, do_sample=False)
        asks = Asks(model, longer)
        found = model.generate(
            **batch, max_new_tokens=4, do_sample=False, logits_processor=LogitsProcessorList([asks]), **how
        )
    assert torch.equal(found, plain) and all(torch.equal(logits, alone) for logits in asks.kept) and asks.kept


# --- arguments against the config ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vtc_cls@9", "uniform@9"])
def test_arguments_that_override_the_config_are_refused(method: str) -> None:
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, method), torch.no_grad():
        for more in ({"vision_feature_layer": -1}, {"vision_feature_select_strategy": "full"}):
            for call in (model, lambda **k: model.generate(**k, max_new_tokens=2)):
                with pytest.raises(ValueError, match=rf"{next(iter(more))} is .* in this call, and was"):
                    call(**batch, **more)
        model(**batch, vision_feature_layer=-2)
        model.config.vision_feature_layer = -1
        with pytest.raises(ValueError, match=r"vision_feature_layer is -1.*remove\(\)"):
            model(**batch)
        model.config.vision_feature_layer = -2
        model(**batch)


# --- copies, replicas, embeddings ---------------------------------------------------------------------------------


def test_pickles_and_copies_of_a_wrapped_model_are_refused_with_our_sentence() -> None:
    model = tiny_llava()
    with tokenprune.applied(model, "vtc_cls@9"):
        for part in (model, model.model, model.model.language_model, {"net": model}):
            for refused in (pickle.dumps, copy.deepcopy, lambda part: torch.save(part, io.BytesIO())):
                with pytest.raises(TypeError, match=r"a copy or a pickle of it.*remove\(\).*save_pretrained"):
                    refused(part)
        torch.save(model.state_dict(), io.BytesIO())
    copy.deepcopy(pickle.loads(pickle.dumps(model)))


def test_replicas_of_data_parallel_are_refused() -> None:
    model, batch = tiny_llava(), prompts([1])
    replica = copy.copy(model.model)
    with tokenprune.applied(model, "uniform@9"):
        replica._forward_pre_hooks = model.model._forward_pre_hooks
        with torch.no_grad(), pytest.raises(RuntimeError, match="DistributedDataParallel"):
            replica(**batch)
        with torch.no_grad():
            model(**batch)


def test_embeddings_that_may_hold_features_are_pointed_out() -> None:
    model, batch = tiny_llava(), prompts([1])
    with torch.no_grad(), tokenprune.applied(model, "uniform@9"):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        features = model.get_image_features(batch["pixel_values"]).pooler_output
        merged = embeds.masked_scatter((batch["input_ids"] == IMAGE)[..., None], torch.cat(list(features)))
        with pytest.warns(UserWarning, match=r"inputs_embeds without pixels.*run unpruned"):
            model(inputs_embeds=merged, attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("method", [{"at": "vision:1", "prune": "random", "keep": 9}, "downsample@9"])
def test_features_that_lost_tokens_in_the_tower_are_not_merged_by_hand(method: Any) -> None:
    model, batch = tiny_llava(), prompts([1, 1])
    ids, pixels = batch["input_ids"], batch.pop("pixel_values")
    text = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": batch["attention_mask"]}

    def merged() -> dict[str, Any]:
        features = model.get_image_features(pixels).pooler_output
        features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        rows = text["inputs_embeds"].masked_scatter((ids == IMAGE)[..., None], features)
        return {**text, "inputs_embeds": rows}

    with torch.no_grad():
        whole = merged()
        with tokenprune.applied(model, method):
            with pytest.raises(ValueError, match=r"54 of its rows are zeros: .*mm_encoder_outputs"):
                model.generate(**merged(), max_new_tokens=2)
            for given in (whole, text):  # there the warning says all
                with pytest.warns(UserWarning, match="they run unpruned"):
                    model(**given)
            encoded = model.get_image_features(pixels, return_dict=True)
            model.generate(**batch, mm_encoder_outputs={"image": encoded}, max_new_tokens=2)


def test_wrappers_are_looked_through() -> None:
    class Module(torch.nn.Module):  # as DDP and FSDP hold theirs
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs: Any) -> Any:
            return self.module(**kwargs)

    model, batch = tiny_llava(), prompts([1])
    wrapped = torch.compile(Module(model), backend="eager")
    assert unwrap(wrapped) is model and unwrap(model) is model and unwrap(3) == 3
    with torch.no_grad(), tokenprune.applied(Module(model), "uniform@9") as handle:
        Module(model)(**batch)
        assert handle.kept[0][0].numel() == 9


# --- outputs read by place ----------------------------------------------------------------------------------------


def both_sides(images: list[int]) -> dict[str, Any]:
    """Prompts padded on the left, each with a completion padded on the right."""
    batch = prompts(images)
    rows, words = len(images), torch.Generator().manual_seed(3)
    answer = torch.randint(8, 64, (rows, 7), generator=words)
    mask = torch.ones_like(answer)
    for row in range(rows):
        mask[row, 7 - row % 4 :] = 0
    return {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], answer * mask], 1),
        "attention_mask": torch.cat([batch["attention_mask"], mask], 1),
    }


@pytest.mark.parametrize("method", ["uniform@9", "vtc_cls(positions=keep)@9", "fastv@9"])
@pytest.mark.parametrize("training", [False, True])
def test_log_probabilities_of_completions_in_batches_padded_on_both_sides(method: str, training: bool) -> None:
    model, batch = tiny_llava(), both_sides([1, 3, 2, 1])
    mask, keep = batch["attention_mask"], 8
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.train(training)
    with torch.no_grad(), tokenprune.applied(model, method) as handle:
        found = model(**batch, position_ids=positions, logits_to_keep=keep).logits
        kept, adapter, stage = handle.kept, handle.adapter, handle.stages[0]
    with torch.no_grad():
        policy = stage.pruner.positions
        truth = model.lm_head(masked_by(adapter, batch, kept, policy, stage.site).hidden())[:, -keep:]
    real = mask[:, -keep:].bool()
    assert found.shape == truth.shape and relative_error(found[real], truth[real]) < 1e-5


@pytest.mark.parametrize("layout", ["ragged_right", "one_left"])
@pytest.mark.parametrize("reader", ["hidden_states", "base", "logits"])
def test_pooling_of_the_last_token(layout: str, reader: str) -> None:
    model, batch = family("llava"), batch_of("llava", layout)
    mask = batch["attention_mask"]
    rows, last = torch.arange(len(mask)), mask.sum(1) - 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), tokenprune.applied(model, "vtc_cls@9") as handle:
        if reader == "base":
            found = model.model(**batch, position_ids=positions).last_hidden_state[rows, last]
        else:
            output = model(**batch, position_ids=positions, output_hidden_states=True)
            found = (output.logits if reader == "logits" else output.hidden_states[-1])[rows, last]
        kept, adapter = handle.kept, handle.adapter
    with torch.no_grad():
        truth = masked_by(adapter, batch, kept, "compact").hidden()[rows, last]
        assert relative_error(found, model.lm_head(truth) if reader == "logits" else truth) < 1e-5


def test_outputs_of_one_length_are_there_for_the_asking() -> None:
    model, batch = tiny_llava(), prompts([1, 2])
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        for mode, length in (("full", width), ("kept", width - 54), ("auto", width - 54)):
            with tokenprune.applied(model, "uniform@9", outputs=mode) as handle:
                logits = model(**batch).logits
                assert logits.shape[1] == length, mode
                stays = handle.stays & batch["attention_mask"].bool()
            shown = (
                logits[stays] if mode == "full" else logits[torch.arange(length) >= length - stays.sum(1, keepdim=True)]
            )
            if mode == "full":
                whole = shown
            assert torch.equal(shown, whole)
        with pytest.raises(ValueError, match="outputs must be one of 'auto', 'full', 'kept', got 'long'"):
            tokenprune.apply(model, "uniform@9", outputs="long")


@pytest.mark.parametrize("method", ["uniform@9", "fastv@9", "pyramiddrop@9"])
def test_hidden_states_of_all_layers_have_the_length_of_the_prompt(method: str) -> None:
    model, batch = tiny_llava(), prompts([2, 1])
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True).hidden_states
        with tokenprune.applied(model, method) as handle:
            states = model(**batch, output_hidden_states=True).hidden_states
            stays = handle.stays & batch["attention_mask"].bool()
    assert [state.shape for state in states] == [state.shape for state in whole]
    assert torch.equal(states[0][stays], whole[0][stays])


@pytest.mark.slow  # transformers takes seconds to begin and end a batch
def test_continuous_batching_of_text_is_left_alone_or_refused() -> None:
    def answered(model: Any) -> Any:
        return model.generate_batch([[9, 10, 11, 12]], max_new_tokens=3, progress_bar=False)["req_0"]

    model = tiny_llava()
    stock = answered(model).generated_tokens
    assert len(stock) == 3
    with tokenprune.applied(model, "fastv@9"):
        assert answered(model).generated_tokens == stock
    with tokenprune.applied(model, VAR):
        error = answered(model).error
        assert "Continuous batching" in error and "var cannot tell" in error
