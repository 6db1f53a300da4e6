"""The fold of licences: properties over every licence of the Hub's list, and the cases by name."""

from __future__ import annotations

import itertools

import pytest

from mergekit_unconstrained.hub.licence_rules import DEMANDS, RULES, WITHOUT_RULE
from mergekit_unconstrained.hub.licences import (
    NOT_LEGAL_ADVICE,
    STATUSES,
    Verdict,
    distillation,
    kept_private,
    named,
    told,
    verdict,
)

# https://huggingface.co/docs/hub/repositories-licenses
_LISTED = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 grok2-community gemma unknown other
"""
HUB = _LISTED.split()
SAMPLE = [
    "cc0-1.0", "mit", "apache-2.0", "cc-by-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-2.1",
    "lgpl-3.0", "mpl-2.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "openrail", "cc-by-nc-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-4.0", "apple-amlr", "llama2", "llama3", "llama3.1", "gemma",
    "cc-by-nd-4.0", None,
]  # fmt: skip
"""At least one of every family and of every relation between two."""


def fold(*licences: str | None) -> Verdict:
    return verdict([("m", licence) for licence in licences])


def rank(found: Verdict) -> int:
    return STATUSES.index(found.status)


def demands(licence: str | None) -> frozenset[str]:
    return RULES[licence].demands if licence in RULES else frozenset()


def test_every_licence_of_the_hub_has_a_rule_or_is_said_to_have_none():
    assert set(RULES) | WITHOUT_RULE == set(HUB)
    assert not set(RULES) & WITHOUT_RULE
    for rule in RULES.values():
        assert rule.link.startswith("https://")
        assert set(rule.compatible) | set(rule.against) <= set(RULES)
        assert rule.id not in (*rule.compatible, *rule.against)
    assert {rule.family for rule in RULES.values()} == set(DEMANDS)


@pytest.mark.parametrize("licence", HUB)
def test_a_model_of_one_licence_stays_under_it(licence):
    found = fold(licence, licence)
    assert found == fold(licence)
    if licence in WITHOUT_RULE:
        assert (found.effective, found.status) == ("other", "review")
    else:
        refused = RULES[licence].family == "no derivatives"
        assert found.effective == ("other" if refused else licence)
        assert found.status == ("refused" if refused else "clear")


def test_of_any_two_licences_the_order_does_not_matter_and_nothing_gets_milder():
    for one, two in itertools.combinations_with_replacement(HUB, 2):
        found = fold(one, two)
        assert found == fold(two, one) == fold(one, two, one, two)
        for alone in (one, two):
            before = fold(alone)
            assert rank(found) >= rank(before)
            assert set(found.duties) >= set(before.duties)
            if found.effective != "other" and found.status != "refused":
                assert RULES[found.effective].demands >= demands(alone)


def test_a_third_licence_never_makes_a_verdict_milder():
    for pair in itertools.combinations(SAMPLE, 2):
        before = fold(*pair)
        for third in SAMPLE:
            found = fold(*pair, third)
            assert rank(found) >= rank(before), (pair, third)
            assert set(found.duties) >= set(before.duties) or before.effective != found.effective
            assert set(before.reasons) <= set(found.reasons)


def test_teachers_and_data_never_make_a_verdict_milder():
    for parent, other in itertools.product(SAMPLE, [*HUB, None]):
        before = verdict([("m", parent)])
        for extra in ({"teachers": [("t", other)]}, {"datasets": [("d", other)]}):
            assert rank(verdict([("m", parent)], **extra)) >= rank(before)


def test_what_is_not_known_is_never_taken_for_permissive():
    for licence in (None, "", "other", "unknown", "cc", "my-licence", "['mit', 'gemma']"):
        for more in ((), ("mit",), ("gpl-3.0", "gemma")):
            found = fold(licence, *more)
            assert found.effective == "other"
            assert rank(found) >= STATUSES.index("review")


def family(*names: str) -> list[str]:
    return [rule.id for rule in RULES.values() if rule.family in names]


def test_no_derivatives_are_refused_whatever_is_beside_them():
    for licence, other in itertools.product(family("no derivatives"), HUB):
        assert fold(licence, other).status == "refused"


def test_a_result_that_may_not_be_shared_gets_nobodys_licence():
    for licences in (["cc-by-nd-4.0"], ["cc-by-nd-4.0", "mit"], ["cc-by-nc-nd-4.0", None]):
        found = fold(*licences)
        assert (found.effective, found.name, found.link) == ("other", "not-to-be-shared", None)
        assert found.grounds == ()
        assert "m is under CC BY-" in kept_private(found)
        assert kept_private(found).startswith("private only (refused): ")
    found = verdict([("p", "apache-2.0")], [("t", "llama2")])
    assert (found.effective, found.name) == ("other", "conflicting-terms")
    assert "until somebody has checked the licences (conflict)" in kept_private(found)
    assert kept_private(fold("mit")) is kept_private(fold(None)) is None


def test_copyleft_conflicts_with_whatever_adds_restrictions():
    strict = family("non-commercial", "use restrictions", "research only", "vendor")
    for licence, other in itertools.product(family("copyleft"), strict):
        assert (fold(licence, other).effective, fold(licence, other).status) == (
            "other",
            "conflict",
        )


def test_two_vendors_are_other_and_need_a_look():
    for one, two in itertools.combinations(family("vendor"), 2):
        assert (fold(one, two).effective, fold(one, two).status) == ("other", "review")


@pytest.mark.parametrize(
    ("licences", "effective", "status"),
    [
        ("mit apache-2.0", "apache-2.0", "clear"),
        ("mit cc0-1.0", "mit", "clear"),
        ("apache-2.0 gpl-3.0", "gpl-3.0", "clear"),
        ("apache-2.0 gpl-2.0", "other", "conflict"),  # as the FSF reads it
        ("mit gpl-2.0", "gpl-2.0", "clear"),
        ("gpl-2.0 gpl-3.0", "other", "conflict"),
        ("gpl gpl-2.0", "gpl-2.0", "clear"),
        ("gpl-3.0 agpl-3.0", "agpl-3.0", "clear"),
        ("lgpl-2.1 lgpl-3.0", "gpl-3.0", "clear"),
        ("cc-by-sa-4.0 gpl-3.0", "gpl-3.0", "clear"),
        ("cc-by-sa-4.0 cc-by-nc-4.0", "other", "conflict"),
        ("cc-by-nc-4.0 apache-2.0", "cc-by-nc-4.0", "clear"),
        ("cc-by-nc-4.0 cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", "clear"),
        ("cc-by-nc-sa-2.0 cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", "clear"),
        ("gemma apache-2.0", "gemma", "clear"),
        ("llama3.1 mit apache-2.0", "llama3.1", "clear"),
        ("llama3 llama3.1", "other", "review"),
        ("openrail bigscience-openrail-m", "other", "review"),
        ("openrail cc-by-nc-4.0", "other", "review"),
        ("Apache-2.0 MIT", "apache-2.0", "clear"),
    ],
)
def test_known_pairs(licences, effective, status):
    found = fold(*licences.split())
    assert (found.effective, found.status) == (effective, status)
    assert bool(found.reasons) == (status != "clear")


@pytest.mark.parametrize(
    ("parent", "teacher", "effective", "status", "said"),
    [
        ("apache-2.0", "mit", "apache-2.0", "clear", ""),
        ("apache-2.0", "gemma", "gemma", "clear", ""),  # its terms follow distillation
        ("llama3.1", "gemma", "other", "review", "No single licence"),
        ("gpl-3.0", "gemma", "other", "conflict", "cannot both be kept"),
        ("apache-2.0", "llama2", "other", "conflict", "forbids"),
        ("apache-2.0", "llama3", "other", "conflict", "forbids"),
        ("llama3", "llama3", "llama3", "clear", ""),  # derivatives of Llama 3 may learn from it
        ("apache-2.0", "llama3.1", "apache-2.0", "review", "begins with Llama"),
        ("apache-2.0", "cc-by-nc-4.0", "apache-2.0", "review", "not clear"),
        ("apache-2.0", "cc-by-nd-4.0", "other", "conflict", "not clear"),
        ("apache-2.0", "bigscience-openrail-m", "bigscience-openrail-m", "clear", ""),
        ("apache-2.0", None, "apache-2.0", "review", "is not known"),
    ],
)
def test_teachers_count(parent, teacher, effective, status, said):
    found = verdict([("org/pivot", parent)], [("org/teacher", teacher)])
    assert (found.effective, found.status) == (effective, status)
    assert said in " ".join(found.reasons)
    if teacher == "gemma":
        assert any("trained on its outputs" in ground for ground in found.grounds)
        assert not any("trained on its outputs" in duty for duty in found.duties)
    if teacher == "llama3.1":
        duties = " ".join(found.duties)
        for words in ('begin with "Llama"', "Built with Llama", "Pass on the agreement"):
            assert words.lower() in duties.lower().replace("begin the name of the result", "begin")


def test_a_teacher_that_may_only_improve_its_own_kind_needs_all_parents_to_be_of_it():
    teacher = [("t", "llama3")]
    assert verdict([("a", "llama3"), ("b", "llama3")], teacher).status == "clear"
    assert verdict([("a", "llama3"), ("b", "apache-2.0")], teacher).status == "conflict"
    assert verdict([("a", "llama3"), ("b", None)], teacher).status == "conflict"


def test_data_count():
    found = verdict([("p", "mit")], [], [("org/free", "mit"), ("org/nc", "cc-by-nc-4.0")])
    assert found.status == "review"
    assert "Credit the data set org/free (the MIT licence)." in found.duties
    assert "org/nc" in found.reasons[0]
    assert verdict([("p", "mit")], [], [("d", "llama3")]).status == "conflict"
    assert verdict([("p", "mit")], [], [("d", None)]).status == "review"


def test_a_verdict_is_told_with_its_reasons_duties_and_limits():
    lines = told(fold("gpl-3.0", "gemma"))
    assert "gemma-and-gpl-3.0; status: conflict" in lines[0]
    assert "- Gemma Terms of Use and GNU GPL 3.0 cannot both be kept by one work." in lines
    assert any(line.startswith("- duty: ") for line in lines)
    assert lines[-1] == NOT_LEGAL_ADVICE
    assert "not legal advice" in NOT_LEGAL_ADVICE


@pytest.mark.parametrize(
    ("licence", "name", "kept"),
    [
        ("llama3.1", "Llama-3.1-math", True),
        ("llama3.1", "llama_math", True),
        ("llama3.1", "math-Llama", False),
        ("llama3", "Llama-3-math", True),
        ("llama3", "Llama-math", False),
        ("llama2", "math", True),
        ("mit", "math", True),
    ],
)
def test_a_name_that_breaks_a_duty_needs_a_look(licence, name, kept):
    for found in (fold(licence), fold(licence, "gemma"), fold(licence, "cc-by-nd-4.0")):
        renamed = named(found, name)
        assert (renamed == found) == kept
        if not kept:
            assert STATUSES.index(renamed.status) >= STATUSES.index("review")
            assert rank(renamed) >= rank(found)
            assert name in " ".join(renamed.reasons)
    taught = verdict([("p", "mit")], [("t", licence)])
    assert (named(taught, name) == taught) == (kept or licence == "llama3")  # that one conflicts


def test_it_is_said_why_it_is_this_licence():
    assert fold("mit").grounds == (
        "Every model whose terms bind this one is under the MIT licence.",
    )
    (ground,) = fold("mit", "gemma").grounds
    assert ground.startswith("Gemma Terms of Use governs since it demands whatever the MIT licence")
    (ground,) = fold("lgpl-2.1", "lgpl-3.0").grounds
    assert "GNU LGPL 2.1 and GNU LGPL 3.0 demand, and is the licence that they name" in ground
    assert fold("mit", None).grounds == fold("gpl-3.0", "gemma").grounds == ()


def test_a_model_without_parents_has_no_licence():
    with pytest.raises(ValueError, match="without parents"):
        verdict([])


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("llama3", "improve other"),
        ("Gemma", "derivatives"),
        ("llama3.2", "begins with Llama"),
        ("cc-by-nc-4.0", "not clear"),
    ],
)
def test_a_licence_with_a_word_on_distillation_is_told(licence: str, said: str) -> None:
    sentence = distillation("org/teacher", licence)
    assert sentence is not None
    assert "org/teacher" in sentence
    assert said in sentence


@pytest.mark.parametrize("licence", ["apache-2.0", "mit", None])
def test_of_others_nothing_is_said(licence: str | None) -> None:
    assert distillation("org/teacher", licence) is None
