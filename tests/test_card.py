"""Model cards: what they say, and that nothing in a recipe can make them say something else."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any, get_args

import jinja2
import jinja2.nodes
import pydantic
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCardData
from markdown_it import MarkdownIt

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.fusion.settings import LossName, TargetName
from mergekit_unconstrained.hub import card, markdown
from mergekit_unconstrained.hub.card import (
    CardFacts,
    DataSet,
    Method,
    Parent,
    Score,
    Source,
    WeightFile,
    display_name,
    from_json,
    render,
    sanitise_paths,
    to_json,
    write,
)
from mergekit_unconstrained.hub.facts import Fusion, Teacher, is_hub_id, unknowns
from mergekit_unconstrained.hub.findings import worse
from mergekit_unconstrained.numerics.settings import OPERATORS

CARDS = Path(__file__).parent.parent / "model_cards"
COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


def facts(name: str = "math", **changes: Any) -> CardFacts:
    """Facts in which every text that comes from elsewhere is `name`."""
    base = Source(
        "org/base", "org/base", COMMIT, (WeightFile(name, "a" * 64, 10),), name,
        languages=("en", name), tokenizer=name,
    )  # fmt: skip
    complete = CardFacts(
        title=name,
        method=Method(name, name, name, name, name, "ties", {name: name, "seed": 1, "x": None}),
        parents=(
            Parent("base", base, architecture=name, parameters=134_515_008),
            Parent("expert", base, Source(name, None), weight=name),
            Parent("expert", Source(name, name, name, licence=name, place=name), weight="0.5"),
        ),
        recipe=name,
        command=name,
        versions={name: name, "torch": "2.13.0"},
        outputs=(WeightFile(name, name, 269_060_552),),
        coefficients=name,
        coefficients_name=name,
        recipe_name=name,
        heatmap=name,
        tokenizer=name,
        dtype=name,
        seconds=9.4,
        repo_id=name,
        tag=name,
        machine={"processor": name, "cores": name},
        seeds={name: 3},
        evaluation=(
            Score(name, name, name, 0.5, 0.01, 100),
            Score(name, name, "this model", 0.25, 0.02, 100),
            Score(name, name, name, 0.125),
        ),
        evaluated_on=name,
        data=(DataSet(name, name, name, name, name, name, {name: 5}),),
        chosen=name,
        report="report.md",
        quantised=(name,),
        provenance=True,
        unknown=(name,),
    )
    return dataclasses.replace(complete, **changes)


def least(**changes: Any) -> CardFacts:
    """The fewest facts a merge can have."""
    parents = (Parent("base", Source("base")), Parent("expert", Source("math")))
    known = {"title": "t", "method": Method("layerwise", "Layer-wise merging"), "parents": parents}
    return CardFacts(**{**known, "recipe": "a: 1", "command": "c", "versions": {}, **changes})


def tokens(text: str) -> list:
    """The card's body as CommonMark with tables, flat."""
    body = text.split("\n---\n", 1)[1]
    flat = []
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        flat += [token, *(token.children or ())]
    return flat


def metadata(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0])


# -- the examples -----------------------------------------------------------------------------

EXAMPLES = sorted(path.stem for path in CARDS.glob("example*.json"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_card_is_what_the_template_makes_of_its_facts(name):
    example = from_json((CARDS / f"{name}.json").read_bytes())
    assert render(example) == (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert to_json(example) == (CARDS / f"{name}.json").read_text(encoding="utf-8")
    for picture in (example.heatmap, example.fusion and example.fusion.curves):
        assert picture is None or (CARDS / picture).is_file()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_run_and_parsed(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    blocks = {t.info: t.content for t in tokens(text) if t.type == "fence"}
    compile(blocks["python"], "card", "exec")
    method = metadata(text)["tags"][-1]
    assert f"merge_method: {method}\n" in "".join(
        t.content for t in tokens(text) if t.info == "yaml"
    )
    card_data = ModelCardData(**metadata(text), ignore_metadata_errors=False)
    for result in card_data.eval_results or ():
        assert result.dataset_type
        assert isinstance(result.metric_value, float)
    assert re.search(r"(?<![\w./~-])/(home|root|tmp|work|Users)/", text) is None


def test_there_is_an_example_of_each_kind():
    known = [from_json((CARDS / f"{name}.json").read_bytes()) for name in EXAMPLES]
    assert any(one.fusion is not None for one in known)
    assert any(one.report is not None for one in known)
    assert any(one.fusion is None and one.report is None for one in known)


# -- content ----------------------------------------------------------------------------------


def headings(text: str) -> list[str]:
    found = tokens(text)
    return [found[i + 1].content for i, t in enumerate(found) if t.type == "heading_open"]


def test_sections_come_only_with_content():
    assert headings(render(least())) == [
        "t", "Use", "Parents", "Licence", "Method", "Recipe", "Not known", "Citation",
    ]  # fmt: skip
    text = render(facts(heatmap="coefficients.png"))
    assert headings(text) == [
        "math", "Use", "Evaluation", "What it is worse at", "Parents", "Licence", "Method", "Data",
        "Coefficients", "Recipe", "Checksums", "Not known", "Citation",
    ]  # fmt: skip
    assert "](./coefficients.png)" in text
    for shown in (text, render(least())):
        assert re.search(r"^## .*\n+(?=## |\Z)", shown, re.M) is None  # a heading without content
        assert "\n\n\n" not in shown


def licensed(*licences: str | None, **changes: Any) -> CardFacts:
    """A base and experts from the Hub under these licences."""
    sources = [Source(f"o/m{i}", f"o/m{i}", COMMIT, licence=one) for i, one in enumerate(licences)]
    roles = ["base", *["expert"] * (len(sources) - 1)]
    parents = tuple(Parent(role, s) for role, s in zip(roles, sources, strict=True))
    return least(parents=parents, **changes)


def test_metadata_names_hub_models_once_in_order():
    assert "base_model" not in metadata(render(least()))
    shown = metadata(render(facts()))
    assert shown["base_model"] == ["org/base", "math"]
    assert shown["base_model_relation"] == "merge"
    assert shown["datasets"] == ["math"]


@pytest.mark.parametrize(
    ("licences", "license", "name"),
    [
        (("apache-2.0", "mit"), "apache-2.0", None),
        (("apache-2.0", "gemma"), "gemma", None),
        (("gpl-3.0", "gemma"), "other", "gemma-and-gpl-3.0"),
        (("mit", None), "other", "mit-and-unknown"),
        ((None, "My Licence v2"), "unknown", None),
    ],
)
def test_the_licence_is_folded_and_told(licences, license, name, tmp_path):
    known = licensed(*licences)
    shown = metadata(render(known))
    assert (shown["license"], shown.get("license_name")) == (license, name)
    write(tmp_path, known)
    assert (tmp_path / "LICENSE.md").is_file() == (license == "other")
    assert shown.get("license_link") == ("LICENSE.md" if license == "other" else None)
    text = render(known)
    section = text.split("## Licence\n")[1].split("\n## ")[0]
    assert "not legal advice" in section
    assert f"Status: {known.verdict.status}." in section
    for sentence in (*known.verdict.duties, *known.verdict.reasons):
        assert markdown.md(sentence) in section
    if license == "other":
        terms = (tmp_path / "LICENSE.md").read_text(encoding="utf-8")
        assert "o/m0" in terms
        assert "not legal advice" in terms


def test_why_it_is_this_licence_and_what_a_name_breaks_is_told():
    llama = licensed("apache-2.0", "llama3.1")
    section = render(llama).split("## Licence\n")[1].split("\n## ")[0]
    assert "governs since it demands whatever Apache License 2.0 demands" in section
    assert "does not begin with" in section
    assert "Status: review." in section
    for name in ("Llama-math", "o/Llama-3.1-math", "llama_math"):
        renamed = dataclasses.replace(llama, title=name, repo_id=name if "/" in name else None)
        assert "does not begin with" not in render(renamed)
        assert renamed.verdict.status == "clear"
    pushed = dataclasses.replace(llama, title="Llama-math", repo_id="o/math")
    assert "'math' does not begin with" in " ".join(pushed.verdict.reasons)


def test_a_fusion_explains_its_rules_with_their_papers():
    pivot, source = Parent("pivot", Source("p")), Parent("source", Source("t"))
    teachers = (Teacher("t", won=0.3), Teacher("u", weight=0.5, won=0.0))
    known = Fusion(
        "p", "d", 10, 2, teachers, {}, target="min_ce", loss="fused_ce", post_merge="sce_dense"
    )
    text = render(least(parents=(pivot, source), fusion=known))
    for name, paper in (("min_ce", "2401.10491"), ("fused_ce", "2401.10491")):
        assert re.search(rf"^- `{name}`: .*https://arxiv.org/abs/{paper}", text, re.M)
    assert re.search(r"^- `sce_dense`: .*https://arxiv.org/abs/2408.07990", text, re.M)
    assert "the rows do not add up" in text
    assert "trained on this teacher's targets counts" in text
    assert "token distributions of sources of any architecture" not in text
    alone = dataclasses.replace(known, target="avg_ce", post_merge="", teachers=(Teacher("t"),))
    text = render(least(parents=(pivot, source), fusion=alone))
    assert "Conversations won" not in text
    assert "Weight: of no effect" in text


@pytest.mark.parametrize("name", [*get_args(TargetName), *get_args(LossName)])
def test_every_target_rule_and_loss_is_explained(name):
    parents = (Parent("pivot", Source("p")), Parent("source", Source("t")))
    named = {"target" if name in get_args(TargetName) else "loss": name}
    fusion = Fusion("p", "d", 10, 2, (Teacher("t"),), {}, **named)
    assert f"- `{name}`: " in render(least(parents=parents, fusion=fusion))


@pytest.mark.parametrize(
    ("weight", "more", "words"),
    [
        ("0.5", "", "combined with weights chosen for every expert"),
        ("0.1 to 0.9, by layer", "", "weights chosen for every layer of every expert"),
        ("0.1 to 0.9, by kind", "", "weights chosen for every kind of tensor of every expert"),
        ("0.1 to 0.9, by layer and kind", "", "for every layer and kind of tensor of every expert"),
        ("0.5", "density: 0.2", "combined with weights and densities chosen"),
    ],
)
def test_the_method_is_what_was_done_in_this_model(weight, more, words):
    parents = (Parent("base", Source("b")), Parent("expert", Source("x"), weight=weight))
    method = Method("layerwise", "Layer-wise merging", "any of ten operators", operator="ties")
    text = render(least(parents=parents, method=method, coefficients=f"layers: 1\n{more}"))
    assert words in text
    assert "ten operators" not in text


def test_a_stranger_is_told_what_reproducing_needs():
    said = "a stranger cannot do that without `base` and `math`"
    assert said in render(least(provenance=True))
    assert "stranger" not in render(licensed("mit", provenance=True))


def test_a_table_on_a_card_has_all_the_digits():
    """What is merged from the card's own text is what was merged, to the last bit."""
    weight = 0.1 + 0.2  # 0.30000000000000004
    table = f"layers: 1\nexperts:\n  x: {{default: {weight!r}}}\n"
    text = render(least(coefficients=table))
    (shown,) = [t.content for t in tokens(text) if t.type == "fence" and "experts:" in t.content]
    assert yaml.safe_load(shown)["experts"]["x"]["default"] == weight
    assert "with all their digits" in text


def test_underscores_within_words_show_no_backslash():
    assert markdown.md("x86_64 and fused_ce") == "x86_64 and fused_ce"
    assert markdown.md("_em_ a__b _") == "\\_em\\_ a\\_\\_b \\_"


def test_sources_of_one_origin_share_a_sentence():
    def source(name: str) -> Source:
        return Source(name, made_from=("org/base",), licence="mit")

    experts = (Parent("expert", source("x")), Parent("expert", source("y"), weight="0.5"))
    known = least(parents=(Parent("base", source("base")), *experts))
    said = " ".join(unknowns(known))
    assert "base declares itself to be org/base or made from it." in said
    assert "x and y declare themselves to be made from org/base." in said
    assert said.count("org/base") == 2
    assert "On which data the coefficients were chosen" in said
    chosen = dataclasses.replace(known, data=(DataSet("d", "choosing and testing", licence="mit"),))
    assert "On which data" not in " ".join(unknowns(chosen))


def test_teachers_and_data_are_in_the_licence_and_no_base_models():
    pivot = Parent("pivot", Source("o/p", "o/p", COMMIT, licence="apache-2.0"))
    source = Parent("source", Source("o/t", "o/t", COMMIT, licence="gemma"))
    fusion = Fusion("p", "d", 10, 2, (Teacher("t", "gemma"),), {})
    data = (DataSet("o/d", "training", "o/d", licence="mit"),)
    known = least(parents=(pivot, source), fusion=fusion, data=data)
    shown = metadata(render(known))
    assert shown["base_model"] == ["o/p"]
    assert shown["license"] == "gemma"
    assert shown["datasets"] == ["o/d"]
    assert "Credit the data set o/d" in render(known)


def test_the_languages_are_those_that_all_parents_declare():
    one = Source("o/a", "o/a", COMMIT, languages=("en", "de"))
    two = Source("o/b", "o/b", COMMIT, languages=("fr", "de"))
    known = least(parents=(Parent("base", one), Parent("expert", two)))
    assert metadata(render(known))["language"] == ["de"]
    silent = least(parents=(Parent("base", one), Parent("expert", Source("o/c"))))
    assert "language" not in metadata(render(silent))


def test_what_it_is_worse_at_is_told_with_its_distance():
    known = (
        Score("sums", "exact match", "this model", 0.40, 0.03, 100),
        Score("sums", "exact match", "base", 0.10, 0.03, 100),
        Score("sums", "exact match", "expert", 0.60, 0.04, 100),
        Score("words", "bits per byte", "this model", 0.40, 0.03, 100),
        Score("words", "bits per byte", "expert", 0.38, 0.04, 100),
        Score("words", "bits per byte", "base", 0.60, 0.04, 100),
    )
    assert worse(least(evaluation=known)) == (
        "sums: 0.4 exact match against 0.6 of expert, 4.0 standard errors worse.",
        "words: 0.4 bits per byte against 0.38 of expert, 0.4 standard errors worse "
        "(may be chance).",
    )
    text = render(least(evaluation=known[:2]))
    assert "no other model is better" in text


def test_the_results_are_those_of_this_model_alone():
    known = facts(evaluation=(*facts().evaluation, Score("t", "m", "this model", math.nan)))
    (entry,) = metadata(render(known))["model-index"]
    (result,) = entry["results"]
    assert result["metrics"] == [
        {"type": "math", "name": "math, n = 100, standard error 0.02", "value": 0.25}
    ]


def test_numbers_are_written_for_people():
    text = render(facts())
    assert "134.5 M" in text
    assert "1 file, 269 MB" in text
    assert "took 9.4 s" in text
    for seconds, words in ((0, "0.1 s"), (75, "75 s"), (3000, "50 min"), (9000, "2 h 30 min")):
        assert f"took {words}." in render(least(seconds=seconds))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_explained_with_its_paper(operator):
    text = render(least(method=Method("layerwise", "Layer-wise merging", operator=operator)))
    assert f"(operator `{operator}`, [" in text
    assert "](https://arxiv.org/abs/2" in text.split("## Method")[1].split("##")[0]


def test_what_is_missing_is_said():
    said = " ".join(unknowns(least()))
    assert "base and math came from" in said
    assert "licence of base and math, and so the licence of this model" in said
    assert "not been evaluated" in said
    hub = Source("o/m", "o/m", None, licence="mit")
    said = unknowns(least(parents=(Parent("base", hub),), evaluation=facts().evaluation))
    assert said == ("Which commit of o/m was read.",)


def test_every_parent_under_a_licence_without_a_rule_is_named():
    parents = tuple(
        Parent("expert", Source(name, name, COMMIT, licence=licence))
        for name, licence in (("o/a", "other: my-own"), ("o/b", "MIT"), ("o/c", "poetic-1.0"))
    )
    (said,) = (one for one in unknowns(least(parents=parents)) if "demands" in one)
    assert "o/a (declared as 'other: my-own') and o/c (declared as 'poetic-1.0')" in said
    assert "o/b" not in said


def test_densities_stand_next_to_the_weights():
    base = Parent("base", Source("base"))
    thin = Parent("expert", Source("thin"), weight="0.5", density="0.20 to 0.40, by kind")
    text = render(least(parents=(base, thin)))
    assert "| Weight | Density |" in text
    assert "| 0.5 | 0.20 to 0.40, by kind |" in text
    assert "Density" not in render(least(parents=(base, dataclasses.replace(thin, density=""))))


def test_long_tables_of_coefficients_are_folded():
    table = "layers: 99\n" + "# row\n" * 40
    text = render(least(coefficients=table))
    assert text.index("<details>") < text.index("layers: 99") < text.index("</details>")
    assert "<details>" not in render(least(coefficients="layers: 1"))


def test_the_snippet_follows_the_chat_template_and_the_repository():
    assert "apply_chat_template" in render(least(chat_template=True))
    assert "apply_chat_template" not in render(least())
    assert 'model_id = "org/name"' in render(least(repo_id="org/name"))
    assert 'model_id = "."' in render(least())
    pinned = render(least(repo_id="org/name", tag="v1"))
    assert 'revision = "v1"' in pinned
    assert pinned.count("from_pretrained(model_id, revision=revision") == 2
    assert "revision" not in render(least(tag="v1"))  # of no repository


def test_facts_survive_json_and_strange_keys_are_refused():
    for known in (facts(), least()):
        assert from_json(to_json(known)) == known
    with pytest.raises(pydantic.ValidationError, match="licens"):
        from_json(to_json(least()).replace('"licence"', '"license"'))


# -- hostile text -----------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "a | b | c",
    "a \\| b",
    "`code` ``` ````",
    "```\n# fence\n```\n<script>",
    "x\n---\nlicense: mit\n---\n# Owned",
    "x\r\n\r\n# Owned\r\n\x85# Owned\u2028# Owned",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "]]> --> <!-- </details> &lt;b&gt;",
    "$$x$$ \\(y\\) \\[z\\] *em* _em_ ~~s~~",
    "- item\n1. item\n> quote\n    code",
    "a: b #c 'd' \"e\" %f @g !h",
    "\u202eevil\u2066 \x00\x1b[31m",
    "'''\"\"\"; import os; os.system('x')",
    "數學🙂 é",
    "{{ facts.__class__.__mro__ }}{{ ''.__class__ }}{% include '/etc/passwd' %}",
    "\n- x: !!python/object/apply:os.system ['x']\n---\n",
    "&amp;lt;script&gt; &#60;b&#62; <a href='javascript:x'>y</a>",
    "[x]: https://evil.example\n[x] <https://evil.example> https://evil.example",
    "",
]
ALLOWED_HTML = re.compile(r"</?(code|details|summary)>\n?")


def allowed_html(token: Any) -> bool:
    return all(ALLOWED_HTML.fullmatch(tag) for tag in re.findall(r"<[^>]*>\n?", token.content))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("long", [False, True])
def test_no_text_breaks_out_of_its_place(name, long):
    coefficients = name + "\n" + "# row\n" * (40 if long else 0)
    text = render(facts(name, coefficients=coefficients))
    found = tokens(text)
    known = {
        "Use", "Evaluation", "What it is worse at", "Parents", "Licence", "Method", "Data",
        "Coefficients", "Recipe", "Checksums", "Not known", "Citation",
    }  # fmt: skip
    assert set(headings(text)[1:]) <= known
    for token in found:
        if token.type in ("html_block", "html_inline"):
            assert allowed_html(token), token.content
        for attribute in ("href", "src"):
            if token.attrGet(attribute):
                assert token.attrGet(attribute) in (
                    f"https://huggingface.co/org/base/tree/{COMMIT}",
                    "https://arxiv.org/abs/2306.01708",
                    "https://github.com/arcee-ai/mergekit",
                    "./report.md",
                )
    kinds = {t.type for t in found}
    assert not kinds & {"em_open", "strong_open", "blockquote_open", "hr", "code_block"}
    assert "49" not in text.replace(COMMIT, "")
    for character in "\u202e\u2066\x00\x1b\x85\u2028\r":
        assert character not in text
    assert set(metadata(text)) <= {
        "license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags",
        "model-index",
    }  # fmt: skip
    assert metadata(text)["license"] == "unknown"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name])
def test_tables_keep_their_columns(name):
    """As many cells in every row as there were for a harmless name."""

    def shape(text: str) -> str:
        marks = {"table_open": "\n", "tr_open": ",", "td_open": "c", "th_open": "c"}
        return "".join(marks.get(token.type, "") for token in tokens(text))

    expected = shape(render(facts("harmless name", recipe=name, coefficients=name)))
    assert expected.splitlines()[1] == ",cccccc,cccccc,cccccc,cccccc"
    assert shape(render(facts(name))) == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_text_is_still_what_it_was(name):
    """What a reader sees of an escaped text is the text, white space and invisibles aside."""
    expected = " ".join(markdown.visible(name).split())
    for filtered in (markdown.md(name), markdown.code(name)):
        inline = MarkdownIt("commonmark").enable("table").parseInline(filtered)[0].children
        seen = "".join(
            t.content for t in inline if t.type in ("text", "code_inline", "text_special")
        )
        assert " ".join(seen.split()) == expected


def test_every_value_of_the_template_passes_through_a_filter():
    environment = card._environment()
    safe = {"md", "code", "fence", "link", "line", "short", "size", "duration"}
    safe |= {"python", "urlencode", "listed", "table"}
    macros = {"source", "model", "checksums"}
    templates = [path.read_text(encoding="utf-8") for path in sorted(CARDS.glob("*.j2"))]
    assert len(templates) == 2
    outputs = [environment.parse(text).find_all(jinja2.nodes.Output) for text in templates]
    for output in itertools.chain(*outputs):
        for node in output.nodes:
            if isinstance(node, jinja2.nodes.Call):
                assert node.node.name in macros
            elif isinstance(node, jinja2.nodes.Name):
                assert node.name == "front_matter"
            elif isinstance(node, jinja2.nodes.Filter):
                assert node.name in safe
            elif isinstance(node, jinja2.nodes.CondExpr):  # "and" or a comma
                leaves = node.find_all((jinja2.nodes.Name, jinja2.nodes.Filter))
                assert {leaf.name for leaf in leaves} <= {"loop", "local", "length"}
            else:
                assert isinstance(node, jinja2.nodes.TemplateData)


def test_a_model_that_may_not_be_shared_is_under_no_parents_licence(tmp_path):
    for licence, said in (("cc-by-nd-4.0", "forbids to share"), ("gpl-3.0", "None that keeps all")):
        parents = (
            Parent("base", Source("o/b", "o/b", licence="cc-by-nc-4.0")),
            Parent("expert", Source("o/e", "o/e", licence=licence)),
        )
        write(tmp_path, least(parents=parents))
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert metadata(text)["license"] == "other"
        assert metadata(text)["license_name"] != licence
        assert metadata(text)["license_link"] == "LICENSE.md"
        assert said in text
        assert "o/e" in (tmp_path / "LICENSE.md").read_text(encoding="utf-8")


# -- templates of users, writing ----------------------------------------------------------------


def test_a_template_of_ones_own_is_used_and_cannot_reach_out(tmp_path):
    template = tmp_path / "own.j2"
    template.write_text("{{ facts.title | md }}: {{ unknowns | length }}", encoding="utf-8")
    assert render(least(), template) == "t: 3\n"
    for text, message in (
        ("{{ facts.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("a\n{% if %}", r"own\.j2:2"),
        ("{{ facts.title | nofilter }}", "nofilter"),
    ):
        template.write_text(text, encoding="utf-8")
        with pytest.raises(UnconstrainedError, match=message):
            render(least(), template)
    with pytest.raises(UnconstrainedError, match="cannot be read"):
        render(least(), tmp_path / "missing.j2")


def test_a_template_of_ones_own_may_include_and_extend_ours_alone(tmp_path):
    template = tmp_path / "own.j2"
    template.write_text('{% include "merge.md.j2" %}\n\nMore.', encoding="utf-8")
    assert render(facts(), template) == render(facts()) + "\nMore.\n"
    blocks = re.findall(r"{% block (\w+) %}", card.packaged_template())
    for name in blocks:
        text = '{% extends "merge.md.j2" %}{% block ' + name + " %}@@{% endblock %}"
        template.write_text(text, encoding="utf-8")
        before, after = render(facts(), template).split("@@")
        assert render(facts()).startswith(before.rstrip())
        assert render(facts()).endswith(after.lstrip())
    assert re.search(r"replace a block: (.*?)\.\n", card.packaged_template(), re.S)[1].split() == [
        f"{name}," for name in blocks[:-1]
    ] + [blocks[-1]]
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    for name in ("secret.txt", "../secret.txt", str(tmp_path / "secret.txt"), "example.md"):
        template.write_text(f'{{% include "{name}" %}}', encoding="utf-8")
        with pytest.raises(UnconstrainedError, match=r"only merge\.md\.j2 and licence\.md\.j2 can"):
            render(least(), template)


def test_an_error_of_a_template_names_what_there_is(tmp_path):
    template = tmp_path / "own.j2"
    for text, message in (("{{ title }}", "'title' is undefined"), ("{{ facts.x | md }}", "'x'")):
        template.write_text(text, encoding="utf-8")
        with pytest.raises(UnconstrainedError) as raised:
            render(least(), template)
        assert message in raised.value.message
        assert "A template knows disclaimer, facts, finding, front_matter, " in raised.value.message
        assert "facts has title, method, parents, " in raised.value.message
        assert "mergekit_unconstrained" not in raised.value.message


def test_the_template_is_printed_without_a_folder():
    printed = CliRunner().invoke(main, ["card", "--print-template"])
    assert printed.exit_code == 0
    assert printed.output == (CARDS / "merge.md.j2").read_text(encoding="utf-8")


def test_a_card_is_written_whole_or_not_at_all(tmp_path):
    write(tmp_path, least())
    first = (tmp_path / "README.md").read_bytes()
    assert first == render(least()).encode()
    with pytest.raises(UnconstrainedError):
        write(tmp_path, least(), tmp_path / "missing.j2")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_bytes() == first


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("/home/alice/models/math", "math"),
        ("/home/alice/models/math/", "math"),
        ("~/math", "math"),
        ("./math", "math"),
        ("../models/math", "math"),
        ("C:\\Users\\alice\\math", "math"),
        ("\\\\server\\share\\math", "math"),
        ("org/name", "org/name"),
        ("org/name@rev", "org/name@rev"),
        ("gpt2", "gpt2"),
        ("org/name+/home/alice/lora/code", "org/name + code"),
        ("org/name@v1+org/lora@v2", "org/name@v1 + org/lora@v2"),
        ("/x/a@v1", "a"),
        (f"/home/a/.cache/hub/models--org--name/snapshots/{COMMIT}", f"org/name@{COMMIT}"),
        ("models/sub/math", "math"),
        ("/", "model"),
        ("~", "model"),
        ("/a+b+c/math", "math"),
    ],
)
def test_names_show_no_folders_of_the_author(model, shown):
    assert display_name(model) == shown


def test_a_known_folder_keeps_its_last_part_only():
    assert display_name("models/math", local=True) == "math"


def test_texts_lose_absolute_paths_and_keep_everything_else():
    text = (
        "model: /home/alice/models/math  # see https://arxiv.org/abs/1 and a/b, 1/2\n"
        "- '~/lora/x' C:\\Users\\alice\\y file:///home/alice/z\n"
        'base: org/name@rev+/data/secret/code, coefficients: "/tmp/t.yml"\n'
        "regex: / and ~ alone, and/or\n"
    )
    assert sanitise_paths(text) == (
        "model: math  # see https://arxiv.org/abs/1 and a/b, 1/2\n"
        "- 'x' y z\n"
        'base: org/name@rev+code, coefficients: "t.yml"\n'
        "regex: / and ~ alone, and/or\n"
    )
    shown = {"work/m": "org/m", "work/m+work/l": "org/m + l", "/home/a b/m": "m"}
    assert sanitise_paths("work/m+work/l, work/m, work/m2, /home/a b/m", shown) == (
        "org/m + l, org/m, work/m2, m"
    )
    assert "/home" not in render(least(recipe="m: /home/alice/m", command="x /home/alice/o"))


@pytest.mark.parametrize("text", ["a/b/c", "-a/b", "", None, "a b", "../b", "a/../b", "x" * 97])
def test_what_is_no_hub_id(text):
    assert not is_hub_id(text)


def test_the_paper_of_the_method_is_cited_once():
    own = render(least(method=Method("tsvm", "TSV-Merge")))
    assert "@misc{arxiv2412.00081,\n" in own
    assert "= {Task Singular Vectors: Reducing Task Interference in Model Merging},\n" in own
    assert own.count("eprint        = {") == 3
    assert render(least()).count("eprint        = {") == 2  # its paper is cited anyway


def test_what_the_recipe_left_alone_is_said():
    text = render(least(method=Method("tsvm", "TSV-Merge", defaults={"lambda": 1.0, "rank": 0})))
    assert "Left at the defaults: `lambda` `1.0`, `rank` `0`.\n" in text
    assert "Left at the defaults" not in render(least())
