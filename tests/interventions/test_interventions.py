"""Interventions as plug-ins: names, notation, refusals, and one of a user's own that lives outside the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.config.points import check_method_name, needs_budget
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.interfaces.intervention import Intervention
from tokenprune.plan.expression import pruner_parts, split_name, split_outside
from tokenprune.plan.parse import parse_method
from tokenprune.registry import INTERVENTIONS, UnknownName
from tokenprune.seams import cache_argument, cache_in


@pytest.fixture
def zeroed():
    """ZeroTuning in a few lines: the first key of every row weighs gamma times as much, in all rows and layers."""

    @tokenprune.register_intervention("zeroed")
    @dataclass
    class Zeroed(Intervention):
        gamma: float = 0.5
        visual_only = False

        def rows(self, visual, attended, before):
            return attended & ~visual

        def note(self, entering):
            real = torch.ones_like(entering.visual) if entering.attended is None else entering.attended
            return {"first": (real.cumsum(1) == 1) & real & entering.first}

        def attend(self, given):
            groups = given.query.shape[1] // given.key.shape[1]
            key, value = (part.repeat_interleave(groups, 1) for part in (given.key, given.value))
            scores = given.query @ key.transpose(2, 3) * given.scale
            if given.allowed is not None:
                scores = scores.masked_fill(~given.allowed[:, None], float("-inf"))
            first = torch.nn.functional.pad(given.facts["first"], (0, key.shape[2] - given.facts["first"].shape[1]))
            bias = torch.tensor(self.gamma).log() * first[:, None, None].to(scores.dtype)
            return (scores + bias).softmax(-1) @ value

    yield Zeroed
    INTERVENTIONS.unregister("zeroed")


def test_a_plug_in_of_ones_own_is_one_class(zeroed):
    model, batch = tiny_llava(), prompts([1, 2])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**batch).logits
        with tokenprune.applied(model, "zeroed(gamma=1.0)"):
            torch.testing.assert_close(model(**batch).logits[real], stock[real], rtol=1e-4, atol=1e-5)
        with tokenprune.applied(model, "zeroed") as handle:
            changed = model(**batch).logits
            text = model(**prompts([0])).logits
            assert "zeroed  layers 0-3" in str(handle.report())
            decoded = model.generate(
                **batch, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            # a decoded row equals the last row of the longer prompt, which the first key weighs on in the same way
            longer = {
                **batch,
                "input_ids": decoded.sequences[:, :-1],
                "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1),
            }
            positions = (longer["attention_mask"].cumsum(1) - 1).clamp(min=0)
            again = model(**longer, position_ids=positions).logits[:, -1]
        assert not torch.equal(changed, stock) and not torch.equal(text, model(**prompts([0])).logits)
        assert torch.equal(model(**batch).logits, stock)
    torch.testing.assert_close(decoded.logits[-1], again, rtol=1e-4, atol=1e-5)


def test_an_intervention_that_names_rows_of_pictures_is_stopped(zeroed):
    class Wrong(zeroed):
        def rows(self, visual, attended, before):
            return visual

    model = tiny_llava()
    with tokenprune.applied(model, Wrong()), pytest.raises(ValueError, match="Name text alone, or return None"):
        model(**prompts([1]))


def test_two_interventions_need_layers_of_their_own(zeroed):
    model = tiny_llava(layers=6)
    with pytest.raises(ValueError, match="var and zeroed both act in decoder layer 2"):
        tokenprune.apply(model, "var(channels=[1])+zeroed")
    with tokenprune.applied(model, "var(channels=[1])+zeroed(layers=[0, 1, 5])") as handle, torch.no_grad():
        model(**prompts([1]))
        assert "var  layers 2-4" in str(handle.report()) and "zeroed  layers 0-1, 5" in str(handle.report())


def test_notation():
    assert split_outside("vtc_cls@64+var(p=0.4, layers=[2, 3])", "+") == ["vtc_cls@64", "var(p=0.4, layers=[2, 3])"]
    assert split_name("var(p=0.4, layers=[2, 3])") == ("var", {"p": 0.4, "layers": [2, 3]}, None)
    assert split_name("holov(variant=official)@0.25") == ("holov", {"variant": "official"}, "0.25")
    assert pruner_parts("vtc_cls@64+var(p=0.4)") == ["vtc_cls@64"]
    assert parse_method("holov(variant=official)@64").entries[0].pruner.variant == "official"
    assert parse_method("vtc_cls+var(p=0.4)", 64).label == "vtc_cls@64 + var(p=0.4)"
    assert parse_method(["vtc_cls@128", {"method": "var", "p": 0.4}]).label == "vtc_cls@128 + var(p=0.4)"
    assert parse_method("var").entries == () and parse_method("var").label == "var"
    assert parse_method("var+fastv", average=0.5).average == 0.5


@pytest.mark.parametrize(
    ("method", "keep", "said"),
    [
        ("var", 64, "var changes attention and keeps every token, so it takes no budget, got 64"),
        ("var@64", None, "takes no budget"),
        ({"method": "var", "at": "layer:3"}, None, "say which with layers="),
        ("var(p=2)", None, "in \\[0, 1\\], got 2"),
        ("var(p=0.4", None, "brackets of 'var\\(p=0.4' do not close"),
        ("var(0.4)", None, "is written name=value"),
        ("var(variant=best)", None, "'paper' or 'official'"),
        ("var(channels=[])", None, "channels must be a list"),
        ("var(visual_sinks=hide)", None, "'rank', 'keep' or 'drop'"),
        ("var(layers=[-1])", None, "layers must be a list"),
        ("var(tau=-1)", None, "tau must be a number"),
        ("vtc_cls+var", None, "Say how many visual tokens to keep"),
    ],
)
def test_what_cannot_be_read_is_answered_with_a_sentence(method, keep, said):
    with pytest.raises(ValueError, match=said):
        parse_method(method, keep)


def test_unknown_names_and_options_have_near_matches():
    with pytest.raises(TypeError, match="no option 'pp'.* Its options: .*rho"):
        parse_method("var(pp=1)")
    with pytest.raises(UnknownName, match="Did you mean 'var'"):
        check_method_name("vtc_cls+vaar")


def test_what_a_model_cannot_have_is_refused_before_anything_runs():
    model = tiny_llava()
    with pytest.raises(ValueError, match="layer 9, and this decoder has layers 0 to 3"):
        tokenprune.apply(model, "var(layers=[9], channels=[1])")
    with pytest.raises(ValueError, match="channels name 48, and hidden states here have 48"):
        tokenprune.apply(model, "var(channels=[48])")
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        tokenprune.apply(model, "var(channels=[1])")
    with pytest.raises(ValueError, match="var cannot keep|cannot keep any out"):
        other = tiny_llava()
        with tokenprune.applied(
            other,
            [{"method": "pool", "keep": 9, "at": "layer:2"}, "var(channels=[1], tau=1, visual_sinks=keep)"],
        ):
            other(**prompts([1]))


def test_lists_and_the_command_line(capsys):
    assert {"naavit", "shortv", "var", "zerotuning"} <= set(tokenprune.list_interventions())
    main(["ls", "interventions"])
    listed = capsys.readouterr().out
    assert "\nvar " in f"\n{listed}" and "arXiv 2505.11739" in listed
    main(["ls", "interventions", "zerotuning"])
    assert "gamma = 1.0\n      above 0; 1 switches it off" in capsys.readouterr().out
    assert main(["ls", "interventions", "zerotunin"]) == 2 and "Did you mean 'zerotuning'" in capsys.readouterr().err
    assert main(["eval", "--method", "var", "--keep", "64"]) == 2
    assert "leave --keep out" in capsys.readouterr().err
    assert main(["eval", "--method", "vtc_cls+var"]) == 2
    assert "--keep 64" in capsys.readouterr().err
    assert main(["eval", "--method", "vtc_cls+vra", "--keep", "64"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_sweeps_take_interventions():
    methods = ["var", "vtc_cls+var(p=0.4)", "fastv@32+var", {"method": "var", "rho": 0.5}, "vtc_cls@9+fastv@5+var"]
    config = RunConfig("x", "pocket-llava", ["pocket"], methods, [64, 128])
    config.check()
    asked = [point.label for point in config.points() if not point.reference]
    assert asked == ["var", "vtc_cls+var(p=0.4)@64", "vtc_cls+var(p=0.4)@128", "fastv+var@32", "var(rho=0.5)",
                     "vtc_cls@9+fastv@5+var"]  # fmt: skip
    assert needs_budget("vtc_cls+var") and not needs_budget("var") and not needs_budget("vtc_cls@9+var")


@pytest.mark.parametrize("method", ["var(p=0)", "var(layers=[])"])
def test_an_intervention_that_is_off_wants_nothing(method):
    model = tiny_llava()
    with tokenprune.applied(model, method) as handle, torch.no_grad():
        model(**prompts([1]))
        assert handle.interventions[0].wants_prompts == 0
        assert "off: p, rho, s_min or layers" in str(handle.report())


MEASURING = {"cmai": "cmai", "gift": "gift(measured=1, layers=[2, 3])"}


@pytest.mark.parametrize("name", INTERVENTIONS.names())
def test_text_alone_keeps_its_bits(name):
    if name in ("shortv", "zerotuning", "act"):
        pytest.skip("it changes text too, or needs a file")
    model, batch = tiny_llava(), prompts([0, 0])
    given: dict[str, Any] = {**batch, "max_new_tokens": 4, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        stock = torch.stack(model.generate(**given, return_dict_in_generate=True).logits)
        method = "var(channels=[3])" if name == "var" else name
        with tokenprune.applied(model, method):
            found = torch.stack(model.generate(**given, return_dict_in_generate=True).logits)
    assert torch.equal(found, stock)


@pytest.mark.parametrize("name", sorted(MEASURING))
def test_a_first_turn_of_text_alone_and_a_picture_in_the_second(name):
    model, batch = tiny_llava(), prompts([1])
    ids, first = batch["input_ids"], int((batch["input_ids"][0] == 5).nonzero()[0])
    with torch.no_grad(), tokenprune.applied(model, MEASURING[name]):
        whole = model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=True)
        cache = cache_in(model(input_ids=ids[:, :first], use_cache=True))
        given = {**cache_argument(cache), "pixel_values": batch["pixel_values"]}
        turn = model(input_ids=ids[:, first:], **given, use_cache=True)
        after = [model(input_ids=ids[:, :1], **cache_argument(cache_in(one))).logits for one in (whole, turn)]
    stock = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[:, -1]
    torch.testing.assert_close(turn.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[1], after[0], rtol=1e-4, atol=1e-4)
    assert (whole.logits[:, -1] - stock).abs().max() > 1e-3, "it must have changed something"
