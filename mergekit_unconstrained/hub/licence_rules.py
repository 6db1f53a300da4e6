"""What each licence of the Hub's list demands of a merge and of a model that learns from outputs.

A reading by engineers, not legal advice: every rule links to the text that it is about, and where
the two differ the text is right. The families are ours, and so is one choice in them: weights have
no parts that are merely linked, so licences with a weaker copyleft for libraries or files (LGPL,
MPL, EPL) count as copyleft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "public domain",
    "permissive",
    "copyleft",
    "use restrictions",
    "non-commercial",
    "non-commercial, share alike",
    "research only",
    "vendor",
    "no derivatives",
]
Outputs = Literal["free", "unclear", "derivative", "named", "forbidden"]
"""Of a model that was trained on the outputs:

free         the licence says nothing of outputs
unclear      it can be read either way, or restricts the use of the teacher itself
derivative   the definition of a derivative includes distillation, so the terms follow
named        the model's name has to begin with a given word
forbidden    outputs may not improve models that are not derived from the teacher
"""

DEMANDS: dict[Family, frozenset[str]] = {
    "public domain": frozenset(),
    "permissive": frozenset({"notice"}),
    "copyleft": frozenset({"notice", "same terms"}),
    "use restrictions": frozenset({"notice", "restrictions"}),
    "non-commercial": frozenset({"notice", "non-commercial"}),
    "non-commercial, share alike": frozenset({"notice", "non-commercial", "same terms"}),
    "research only": frozenset({"notice", "restrictions", "non-commercial"}),
    "vendor": frozenset({"notice", "restrictions", "vendor"}),
    "no derivatives": frozenset({"notice", "no derivatives"}),
}
"""What a result under another licence would have to demand as well."""

_NOTICE = "Keep the copyright notice and the text of {name}."
_CHANGES = "Say that the files were changed ({name})."
_SAME = "Publish the result under {name} or a licence that it names as compatible."
_RESTRICTED = "Pass on the restrictions on use of {name}, and the licence's text, to every user."
_NO_COMMERCE = "No commercial use of the result ({name})."
_RESEARCH = "Use the result for non-commercial research only ({name})."
_CREDIT = "Credit the authors and link to {name}."
_TERMS = "Pass on the agreement and the use policy of {name}, with its notice, to every user."
_BUILT = 'Show "Built with Llama" where the result is offered ({name}).'
_NAMED = 'Begin the name of the result with "Llama" ({name}).'
_RENAME = "Do not publish the result under the parent's name ({name})."

DUTIES: dict[Family, tuple[str, ...]] = {
    "public domain": (),
    "permissive": (_NOTICE,),
    "copyleft": (_NOTICE, _CHANGES, _SAME),
    "use restrictions": (_NOTICE, _CHANGES, _RESTRICTED),
    "non-commercial": (_CREDIT, _CHANGES, _NO_COMMERCE),
    "non-commercial, share alike": (_CREDIT, _CHANGES, _NO_COMMERCE, _SAME),
    "research only": (_NOTICE, _RESEARCH),
    "vendor": (_TERMS,),
    "no derivatives": ("{name} does not allow to share what was derived from it.",),
}


@dataclass(frozen=True)
class Rule:
    """One licence. id: as the Hub writes it. link: its text. duties: of whoever publishes a merge.

    compatible: licences under which a derivative may be published instead. against: licences whose
    works cannot be part of a derivative under this one, although the families would allow it.
    beginning: what the name of the result has to begin with, where the licence asks for that.
    """

    id: str
    name: str
    family: Family
    link: str
    outputs: Outputs = "free"
    duties: tuple[str, ...] = ()
    compatible: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    beginning: str = ""

    @property
    def demands(self) -> frozenset[str]:
        """What every result must demand as well."""
        return DEMANDS[self.family]

    @property
    def all_duties(self) -> tuple[str, ...]:
        """Sentences with the licence's name in them."""
        every = dict.fromkeys((*DUTIES[self.family], *self.duties))
        return tuple(duty.format(name=self.name) for duty in every)


def _spdx(name: str) -> str:
    return f"https://spdx.org/licenses/{name}.html"


def _cc(kind: str, version: str) -> str:
    return f"https://creativecommons.org/licenses/{kind}/{version}/legalcode"


def _family(
    family: Family, rows: tuple[tuple[str, str, str], ...], outputs: Outputs = "free"
) -> list[Rule]:
    return [Rule(i, name, family, link, outputs) for i, name, link in rows]


_GPL_3 = ("gpl-3.0", "agpl-3.0")
_GPL_ANY = ("gpl", "gpl-2.0", *_GPL_3)
_LLAMA = "https://www.llama.com/{}/license/"
_CC_CHANGES = (_CREDIT, _CHANGES)

_RULES = [
    *_family(
        "public domain",
        (
            ("cc0-1.0", "CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/legalcode"),
            ("unlicense", "the Unlicense", _spdx("Unlicense")),
            ("wtfpl", "the WTFPL", _spdx("WTFPL")),
            ("pddl", "the ODC Public Domain Dedication", _spdx("PDDL-1.0")),
        ),
    ),
    Rule(
        "apache-2.0",
        "Apache License 2.0",
        "permissive",
        "https://www.apache.org/licenses/LICENSE-2.0",
        duties=(_CHANGES, "Keep the NOTICE file where the parent has one ({name})."),
    ),
    *_family(
        "permissive",
        (
            ("mit", "the MIT licence", _spdx("MIT")),
            ("afl-3.0", "Academic Free License 3.0", _spdx("AFL-3.0")),
            ("bsl-1.0", "Boost Software License 1.0", _spdx("BSL-1.0")),
            ("bsd", "the BSD licence", "https://opensource.org/license/bsd-3-clause"),
            ("bsd-2-clause", "BSD 2-Clause", _spdx("BSD-2-Clause")),
            ("bsd-3-clause", "BSD 3-Clause", _spdx("BSD-3-Clause")),
            ("bsd-3-clause-clear", "BSD 3-Clause Clear", _spdx("BSD-3-Clause-Clear")),
            ("cdla-permissive-1.0", "CDLA Permissive 1.0", _spdx("CDLA-Permissive-1.0")),
            ("cdla-permissive-2.0", "CDLA Permissive 2.0", _spdx("CDLA-Permissive-2.0")),
            ("ecl-2.0", "Educational Community License 2.0", _spdx("ECL-2.0")),
            ("etalab-2.0", "Etalab Open License 2.0", _spdx("etalab-2.0")),
            ("isc", "the ISC licence", _spdx("ISC")),
            ("odc-by", "ODC Attribution", _spdx("ODC-By-1.0")),
            ("openmdw-1.0", "OpenMDW 1.0", "https://openmdw.ai/license/1-0/"),
            ("postgresql", "the PostgreSQL licence", _spdx("PostgreSQL")),
            ("ncsa", "the NCSA licence", _spdx("NCSA")),
            ("zlib", "the zlib licence", _spdx("Zlib")),
        ),
    ),
    *(
        Rule(f"cc-by-{v}", f"CC BY {v}", "permissive", _cc("by", v), duties=_CC_CHANGES)
        for v in ("2.0", "2.5", "3.0", "4.0")
    ),
    Rule(
        "artistic-2.0",
        "Artistic License 2.0",
        "permissive",
        _spdx("Artistic-2.0"),
        duties=(_CHANGES, _RENAME),
    ),
    Rule("lppl-1.3c", "LPPL 1.3c", "permissive", _spdx("LPPL-1.3c"), duties=(_CHANGES, _RENAME)),
    Rule(
        "apple-ascl",
        "Apple Sample Code License",
        "permissive",
        "https://developer.apple.com/support/downloads/terms/apple-sample-code/Apple-Sample-Code-License.pdf",
    ),
    # -- copyleft ----------------------------------------------------------------------------------
    Rule(
        "gpl",
        "GNU GPL",
        "copyleft",
        "https://www.gnu.org/licenses/",
        "unclear",
        compatible=("gpl-2.0", *_GPL_3),  # no version named: any of them
    ),
    Rule(
        "gpl-2.0",
        "GNU GPL 2.0",
        "copyleft",
        _spdx("GPL-2.0-only"),
        "unclear",
        against=("apache-2.0",),  # https://www.gnu.org/licenses/license-list.html#apache2
    ),
    Rule(
        "gpl-3.0",
        "GNU GPL 3.0",
        "copyleft",
        _spdx("GPL-3.0-only"),
        "unclear",
        compatible=("agpl-3.0",),
    ),
    Rule("agpl-3.0", "GNU AGPL 3.0", "copyleft", _spdx("AGPL-3.0-only"), "unclear"),
    Rule(
        "lgpl",
        "GNU LGPL",
        "copyleft",
        "https://www.gnu.org/licenses/",
        "unclear",
        compatible=("lgpl-2.1", "lgpl-3.0", *_GPL_ANY),
    ),
    Rule(
        "lgpl-2.1",
        "GNU LGPL 2.1",
        "copyleft",
        _spdx("LGPL-2.1-only"),
        "unclear",
        compatible=_GPL_ANY,
    ),
    Rule(
        "lgpl-3.0", "GNU LGPL 3.0", "copyleft", _spdx("LGPL-3.0-only"), "unclear", compatible=_GPL_3
    ),
    Rule(
        "mpl-2.0",
        "Mozilla Public License 2.0",
        "copyleft",
        _spdx("MPL-2.0"),
        "unclear",
        compatible=("lgpl-2.1", "lgpl-3.0", "gpl-2.0", *_GPL_3),
    ),
    Rule(
        "eupl-1.1",
        "EUPL 1.1",
        "copyleft",
        _spdx("EUPL-1.1"),
        "unclear",
        compatible=("eupl-1.2", "gpl-2.0", "osl-3.0", "epl-1.0"),
    ),
    Rule(
        "eupl-1.2",
        "EUPL 1.2",
        "copyleft",
        _spdx("EUPL-1.2"),
        "unclear",
        compatible=("gpl-2.0", *_GPL_3, "osl-3.0", "epl-1.0", "mpl-2.0", "lgpl-2.1", "lgpl-3.0"),
    ),
    Rule(
        "cc-by-sa-3.0",
        "CC BY-SA 3.0",
        "copyleft",
        _cc("by-sa", "3.0"),
        "unclear",
        compatible=("cc-by-sa-4.0",),
    ),
    Rule(
        "cc-by-sa-4.0",
        "CC BY-SA 4.0",
        "copyleft",
        _cc("by-sa", "4.0"),
        "unclear",
        compatible=(
            "gpl-3.0",
        ),  # https://creativecommons.org/share-your-work/licensing-considerations/compatible-licenses/
    ),
    *_family(
        "copyleft",
        (
            ("cdla-sharing-1.0", "CDLA Sharing 1.0", _spdx("CDLA-Sharing-1.0")),
            ("epl-1.0", "Eclipse Public License 1.0", _spdx("EPL-1.0")),
            ("epl-2.0", "Eclipse Public License 2.0", _spdx("EPL-2.0")),
            ("gfdl", "GNU Free Documentation License", "https://www.gnu.org/licenses/fdl.html"),
            ("lgpl-lr", "LGPL for Linguistic Resources", _spdx("LGPLLR")),
            ("ms-pl", "Microsoft Public License", _spdx("MS-PL")),
            ("odbl", "Open Database License", _spdx("ODbL-1.0")),
            ("ofl-1.1", "SIL Open Font License 1.1", _spdx("OFL-1.1")),
            ("osl-3.0", "Open Software License 3.0", _spdx("OSL-3.0")),
        ),
        "unclear",
    ),
    # -- responsible use: their "derivatives" include models that outputs were distilled into ------
    *_family(
        "use restrictions",
        (
            ("openrail", "an OpenRAIL licence", "https://www.licenses.ai/ai-licenses"),
            (
                "bigscience-openrail-m",
                "BigScience OpenRAIL-M",
                "https://www.licenses.ai/blog/2022/8/26/bigscience-open-rail-m-license",
            ),
            (
                "creativeml-openrail-m",
                "CreativeML OpenRAIL-M",
                "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
            ),
            (
                "bigscience-bloom-rail-1.0",
                "BigScience BLOOM RAIL 1.0",
                "https://huggingface.co/spaces/bigscience/license",
            ),
            (
                "bigcode-openrail-m",
                "BigCode OpenRAIL-M",
                "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement",
            ),
            (
                "openrail++",
                "OpenRAIL++-M",
                "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
            ),
        ),
        "derivative",
    ),
    Rule(
        "c-uda",
        "Computational Use of Data Agreement",
        "use restrictions",
        _spdx("C-UDA-1.0"),
        "unclear",
    ),
    # -- non-commercial ----------------------------------------------------------------------------
    *(
        Rule(f"cc-by-nc-{v}", f"CC BY-NC {v}", "non-commercial", _cc("by-nc", v), "unclear")
        for v in ("2.0", "3.0", "4.0")
    ),
    *(
        Rule(
            f"cc-by-nc-sa-{v}",
            f"CC BY-NC-SA {v}",
            "non-commercial, share alike",
            _cc("by-nc-sa", v),
            "unclear",
            compatible=tuple(f"cc-by-nc-sa-{later}" for later in ("3.0", "4.0") if later > v),
        )
        for v in ("2.0", "3.0", "4.0")
    ),
    *_family(
        "research only",
        (
            (
                "apple-amlr",
                "Apple Machine Learning Research Model license",
                "https://huggingface.co/apple/DiffuCoder-7B-Base/blob/main/LICENSE",
            ),
            (
                "deepfloyd-if-license",
                "DeepFloyd IF Research License",
                "https://huggingface.co/spaces/DeepFloyd/deepfloyd-if-license",
            ),
            (
                "fair-noncommercial-research-license",
                "FAIR Noncommercial Research License",
                "https://huggingface.co/facebook/fair-noncommercial-research-license",
            ),
            (
                "h-research",
                "H Research License",
                "https://www.hcompany.ai/h-research-license",
            ),
            (
                "intel-research",
                "Intel Research Use License",
                "https://huggingface.co/Intel/intel-research-license",
            ),
        ),
        "unclear",
    ),
    # -- vendors -----------------------------------------------------------------------------------
    Rule(  # 1.b.v of the agreement
        "llama2", "Llama 2 Community License", "vendor", _LLAMA.format("llama2"), "forbidden"
    ),
    Rule(
        "llama3",
        "Llama 3 Community License",
        "vendor",
        _LLAMA.format("llama3"),
        "forbidden",
        duties=(
            'Show "Built with Meta Llama 3" where the result is offered ({name}).',
            'Begin the name of the result with "Llama 3" ({name}).',
        ),
        beginning="Llama 3",
    ),
    *(
        Rule(
            f"llama{v}",
            f"Llama {v} Community License",
            "vendor",
            _LLAMA.format(f"llama{v.replace('.', '_')}"),
            "named",
            duties=(_BUILT, _NAMED),
            beginning="Llama",
        )
        for v in ("3.1", "3.2", "3.3", "4")
    ),
    Rule(  # 1.1(e): "Model Derivatives" include distillation and training on synthetic outputs
        "gemma",
        "Gemma Terms of Use",
        "vendor",
        "https://ai.google.dev/gemma/terms",
        "derivative",
        duties=(_CHANGES,),
    ),
    Rule(
        "grok2-community",
        "Grok 2 Community License",
        "vendor",
        "https://huggingface.co/xai-org/grok-2/blob/main/LICENSE",
        "forbidden",
    ),
    # -- no derivatives ----------------------------------------------------------------------------
    *_family(
        "no derivatives",
        (
            ("cc-by-nd-4.0", "CC BY-ND 4.0", _cc("by-nd", "4.0")),
            ("cc-by-nc-nd-3.0", "CC BY-NC-ND 3.0", _cc("by-nc-nd", "3.0")),
            ("cc-by-nc-nd-4.0", "CC BY-NC-ND 4.0", _cc("by-nc-nd", "4.0")),
        ),
        "unclear",
    ),
]
RULES: dict[str, Rule] = {rule.id: rule for rule in _RULES}
"""The Hub's short name -> what we read in it."""

WITHOUT_RULE = frozenset({"unknown", "other", "cc"})
"""Names of the Hub's list that say nothing by themselves; a person has to look."""
