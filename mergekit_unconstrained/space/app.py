"""The page, in Gradio: five steps from models to a repository. It draws; desk.py acts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import huggingface_hub

from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.numerics.settings import OPERATORS
from mergekit_unconstrained.space import confine, hub_models, views
from mergekit_unconstrained.space.desk import Desk, Settings, chosen, client
from mergekit_unconstrained.space.inspect import Verdict
from mergekit_unconstrained.space.state import State

DTYPES = ("bfloat16", "float16", "float32")
DOWNLOAD = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/yaml"}));
  link.download = "NAME";
  link.click();
  URL.revokeObjectURL(link.href);
  return [];
}"""
Layout = tuple[int, tuple[tuple[str, tuple[str, ...], tuple[str, ...], float], ...]]
"""A number that grows, and the groups with sliders: title, kinds, experts, first weight."""
PRIVATE = {"api_visibility": "private"}


@dataclass(frozen=True)
class _Weights:
    """The inputs of step 3 that are always there."""

    operator: gr.Dropdown
    strength: gr.Slider
    dtype: gr.Dropdown
    dataset: gr.Textbox
    max_steps: gr.Number

    @property
    def all(self) -> list[Any]:
        return [self.operator, self.strength, self.dtype, self.dataset, self.max_steps]


def build(desk: Desk, token: Callable[[], str | None] = huggingface_hub.get_token) -> gr.Blocks:
    """The page. token: of whoever started it; never asked where strangers use it."""
    acts = _Acts(desk, token)
    with gr.Blocks(
        title="mergekit-unconstrained", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        found = gr.State(None, time_to_live=3600)
        state = gr.State(None, time_to_live=3600)
        layout = gr.State((0, ()))
        _head(desk, token)

        _step("1 Parents", "The model that the others come from, and what is merged into it.")
        with gr.Row():
            base = _models(desk, "Base model, or pivot of a fusion", "base", False)
            experts = _models(desk, "Experts", "experts", True)
        bases = _models(desk, "Bases of other groups", "bases", True, visible=False)
        none_here = gr.HTML(acts.hint(), elem_id="no-models")
        with gr.Row(elem_classes="mku-row"):
            words = gr.Textbox(
                label="Search the Hub",
                placeholder="a part of a name",
                max_length=confine.MAX_NAME,
                scale=4,
                elem_id="search",
            )
            search = gr.Button("Search", scale=1, elem_id="search-button")
        search_state = gr.HTML()

        _step("2 Verdict", "Seen from configs and headers; no weight is fetched.")
        verdict = gr.HTML(views.verdict(None), elem_id="verdict")

        _step("3 Weights", "How much of every expert goes where. The recipe follows.")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                weights = _weights()

                @gr.render(inputs=[layout])
                def draw_sliders(now: Layout) -> None:
                    numbers = [s for group in now[1] for s in _group_sliders(*group)]
                    gr.on(
                        [c.change for c in (*weights.all, *numbers)],
                        acts.refresh,
                        [found, state, *weights.all, *numbers],
                        shown,
                        trigger_mode="always_last",
                        show_progress="hidden",
                        **PRIVATE,
                    ).then(acts.commands, [state, name, repository], told, **PRIVATE)

            with gr.Column(scale=6, min_width=320):
                recipe = gr.Code(
                    label="recipe.yml",
                    language="yaml",
                    interactive=False,
                    lines=2,
                    max_lines=26,
                    elem_classes="mku-code",
                    elem_id="recipe",
                )
                recipe_state = gr.HTML(views.recipe_state(None), elem_id="recipe-state")
                download = gr.Button("Download recipe.yml", size="sm", elem_id="download")
                picture = gr.HTML(elem_id="heatmap")
        own, own_use, own_drop = _own()

        _step("4 Merge", "Here where it is small, or with a command anywhere.")
        cost = gr.HTML(elem_id="cost")
        where = gr.HTML(views.where(None), elem_id="where")
        with gr.Row(elem_classes="mku-row"):
            name = gr.Textbox(
                value="merged", label="Name of the result", max_length=96, scale=3, elem_id="name"
            )
            run = gr.Button(
                "Merge", variant="primary", interactive=False, scale=1, elem_id="merge-button"
            )
            cancel = gr.Button("Cancel", variant="stop", interactive=False, scale=1)
        progress = gr.HTML(elem_id="progress")
        with gr.Accordion("Log", open=False):
            log = gr.Textbox(label="What the merge prints", lines=8, max_lines=16, elem_id="log")
        with gr.Accordion("Commands for big ones", open=False):
            code = {"elem_classes": "mku-code"}
            terminal = gr.Code(label="On a machine of yours", language="shell", lines=3, **code)
            remote = gr.Code(
                label="On a machine of the Hub’s, with models of the Hub",
                language="shell",
                lines=1,
                **code,
            )
            script = gr.Code(label="merge_job.py", language="python", lines=6, max_lines=12, **code)
            save = gr.Button("Download merge_job.py", size="sm")

        _step("5 Card and push", "What the model says of itself, then your repository.")
        with gr.Accordion("Card", open=True, visible=False) as card_box:
            card = gr.Markdown(sanitize_html=True, latex_delimiters=[], elem_id="card")
        with gr.Row():
            repository = gr.Textbox(
                label="Repository",
                placeholder="owner/name",
                info="Named before the merge, it is made then, private, to see that you may push.",
                max_length=confine.MAX_NAME,
                min_width=290,
                elem_id="repository",
            )
            tag = gr.Textbox(
                label="Tag",
                placeholder="v1",
                info="Optional: a name for this version.",
                max_length=96,
                min_width=290,
            )
        private = gr.Checkbox(value=True, label="Private repository", elem_id="private")
        checked = gr.Checkbox(
            value=False,
            label="I have checked the licences (only asked for public repositories)",
            elem_id="checked",
        )
        push = gr.Button("Push", variant="primary", interactive=False, elem_id="push-button")
        pushed = gr.HTML(elem_id="pushed")

        shown = [state, recipe, picture, cost, where, recipe_state, run]
        told = [terminal, remote, script]

        hidden = {"show_progress": "hidden", **PRIVATE}
        after = [found, layout, verdict, bases, weights.strength, weights.dtype, weights.dataset]
        after += [weights.operator, weights.max_steps, *shown]
        gr.on(
            [base.change, experts.change, bases.change, own_drop.click],
            acts.choose,
            [base, experts, bases, layout, *weights.all],
            after,
            trigger_mode="always_last",
            **PRIVATE,
        ).then(acts.commands, [state, name, repository], told, **hidden)
        gr.on(
            [search.click, words.submit],
            acts.search,
            [words],
            [search_state, base, experts, bases],
            **PRIVATE,
        )
        own[1].click(acts.check_own, [own[0]], [own[2]], **PRIVATE)
        own_use.click(
            acts.use_own, [own[0], layout], [own[2], found, layout, verdict, *shown], **PRIVATE
        ).then(acts.commands, [state, name, repository], told, **hidden)
        gr.on(
            [name.change, repository.change],
            acts.commands,
            [state, name, repository],
            told,
            trigger_mode="always_last",
            **hidden,
        )
        gr.on(
            [repository.change, tag.change],
            acts.card,
            [repository, tag],
            [card],
            trigger_mode="always_last",
            **hidden,
        )
        download.click(None, [recipe], None, js=DOWNLOAD.replace("NAME", "recipe.yml"))
        save.click(None, [script], None, js=DOWNLOAD.replace("NAME", "merge_job.py"))
        run.click(
            acts.merge,
            [found, state, name, repository, private, tag],
            [progress, log, run, cancel, card_box, card, push],
            concurrency_limit=8,
            **hidden,
        )
        cancel.click(acts.cancel, None, [cancel], queue=False, **PRIVATE)
        push.click(acts.push, [repository, private, tag, checked], [pushed], **PRIVATE)
        page.load(acts.lists, None, [base, experts, bases, none_here], **hidden)
        page.unload(acts.leave)
    return page


def serve(settings: Settings, port: int | None = None, open_browser: bool = False) -> None:
    """Serve the page until Ctrl-C; on the Hub for everybody, elsewhere for this machine alone."""
    desk = Desk(settings)
    page = build(desk)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that jobs end with the page
    try:
        page.queue(default_concurrency_limit=4, max_size=64).launch(
            server_name="0.0.0.0" if settings.hosted else "127.0.0.1",
            server_port=port,
            inbrowser=open_browser,
            show_error=False,
            max_file_size="1mb",
            state_session_capacity=200,
            ssr_mode=False,
            footer_links=[],
            quiet=True,  # no advice to make a public link of it
            prevent_thread_lock=True,
            theme=theme(),
            css=views.STYLE,
            blocked_paths=[str(settings.work_dir.resolve()), str(settings.models_dir.resolve())],
        )
        print(f"The page is at {page.local_url}; Ctrl-C ends it.", flush=True)
        if settings.results is not None:
            print(f"What is merged there stays in {settings.results}.", flush=True)
        page.block_thread()
    finally:
        desk.jobs.close()


def theme() -> gr.themes.Base:
    """Calm colours, and the fonts of the reader's own system: nothing is fetched for the look."""
    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="#475569",
        body_text_color_subdued_dark="#a8b3c4",
        block_info_text_color="#475569",
        block_info_text_color_dark="#a8b3c4",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_hover_dark="#115e59",
        button_primary_text_color="#ffffff",
        checkbox_border_color="#64748b",
        checkbox_border_width="1px",
        input_border_color="#94a3b8",
        input_border_width="1px",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
    )


# -- what is drawn ---------------------------------------------------------------------------------


def _head(desk: Desk, token: Callable[[], str | None]) -> None:
    with gr.Row():
        gr.HTML(
            '<div class="mku-head"><h1>mergekit-unconstrained</h1>'
            "<p>Merge language models, or fuse those that cannot be merged.</p></div>",
            min_width=290,
        )
        if desk.settings.hosted:
            gr.LoginButton(size="sm", scale=0, min_width=220)
    if not desk.settings.hosted and not token():
        words = "No token on this machine, so nothing can be pushed: run “hf auth login”."
        gr.HTML(views.message(words))


def _step(title: str, words: str) -> None:
    gr.HTML(f'<div class="mku-step"><h2>{title}</h2><p>{words}</p></div>')


def _models(desk: Desk, label: str, name: str, several: bool, visible: bool = True) -> gr.Dropdown:
    return gr.Dropdown(
        choices=desk.choices(),
        value=[] if several else None,
        multiselect=several,
        max_choices=confine.MAX_MODELS - 1 if several else None,
        allow_custom_value=True,
        label=label,
        info="A folder in the list, or org/name of the Hub.",
        visible=visible,
        min_width=290,
        elem_id=name,
    )


def _weights() -> _Weights:
    operator = gr.Dropdown(
        sorted(OPERATORS),
        value="task_arithmetic",
        label="Operator",
        info="How the changes of several experts are combined.",
        interactive=True,
        elem_id="operator",
    )
    with gr.Row():
        strength = gr.Slider(
            0, 2, 1, step=0.05, label="Lambda", info="Scales all changes.", min_width=180
        )
        dtype = gr.Dropdown(DTYPES, value="bfloat16", label="Stored as", min_width=120)
    dataset = gr.Textbox(
        "problems.jsonl",
        label="Data for the fusion",
        info="A file beside the recipe, or a data set of the Hub.",
        max_length=confine.MAX_NAME,
        visible=False,
    )
    steps = gr.Number(
        0, precision=0, minimum=0, label="Training steps (0: three epochs)", visible=False
    )
    return _Weights(operator, strength, dtype, dataset, steps)


def _group_sliders(
    title: str, kinds: Sequence[str], names: Sequence[str], weight: float
) -> list[gr.Slider]:
    """The sliders of a group's experts, desk.SLIDERS for each, in the order of `chosen`."""
    found: list[gr.Slider] = []
    if title:
        gr.HTML(f'<div class="mku-step"><p>{views.text(title)}</p></div>')
    for name in names:
        found += _expert_sliders(name, kinds, weight)
    return found


def _expert_sliders(name: str, kinds: Sequence[str], weight: float) -> list[gr.Slider]:
    def slider(label: str, visible: bool = True) -> gr.Slider:
        return gr.Slider(
            -1, 2, weight, step=0.01, label=label, visible=visible, min_width=110, interactive=True
        )

    with gr.Group(elem_classes="mku-expert"):
        overall = gr.Slider(
            -1, 2, weight, step=0.01, label=f"{name}: weight everywhere", interactive=True
        )
        density = gr.Slider(
            0.05,
            1,
            1,
            step=0.05,
            label=f"{name}: density",
            info="Used by ties, dare, della and breadcrumbs.",
            interactive=True,
        )
        with gr.Accordion(f"{name}: by depth and kind", open=False):
            rows = []
            for kind in ("attention", "mlp"):
                with gr.Row():
                    rows += [
                        slider(f"{kind}, {place} ({name})", kind in kinds)
                        for place in ("first", "middle", "last")
                    ]
            rest = slider(f"embeddings, norms, head ({name})")
    fine = [*rows, rest]
    overall.input(
        lambda value: [value] * len(fine),
        [overall],
        fine,
        trigger_mode="always_last",
        show_progress="hidden",
        **PRIVATE,
    )
    return [*fine, density]


def _own() -> tuple[tuple[gr.Textbox, gr.Button, gr.HTML], gr.Button, gr.Button]:
    with gr.Accordion("A recipe of your own", open=False):
        text = gr.Textbox(
            label="Recipe (YAML)",
            lines=8,
            max_lines=20,
            max_length=confine.MAX_RECIPE,
            elem_id="own",
        )
        with gr.Row():
            check = gr.Button("Check", size="sm", elem_id="own-check")
            use = gr.Button("Use it in place of the sliders", size="sm", elem_id="own-use")
            drop = gr.Button("Back to the sliders", size="sm", elem_id="own-drop")
        result = gr.HTML(elem_id="own-state")
    return (text, check, result), use, drop


# -- what happens ----------------------------------------------------------------------------------


class _Acts:
    """The page's events: who acts, what the desk does, what is drawn then."""

    def __init__(self, desk: Desk, token: Callable[[], str | None]) -> None:
        self.desk, self.token = desk, token

    def _who(
        self, request: gr.Request, profile: gr.OAuthProfile | None, oauth: gr.OAuthToken | None
    ) -> tuple[str, str | None]:
        if not self.desk.settings.hosted:
            return f"tab:{request.session_hash}", self.token()
        if profile is not None and oauth is not None:
            return f"user:{profile.username}", oauth.token
        return f"tab:{request.session_hash}", None

    def lists(self) -> list[Any]:
        """The models that lie here now, for the three lists, and what to do if there are none."""
        return [*[gr.update(choices=self.desk.choices())] * 3, self.hint()]

    def hint(self) -> str:
        """How models get into the lists, while there are none."""
        settings = self.desk.settings
        return "" if self.desk.choices() else views.no_models(settings.models_dir, settings.hosted)

    def choose(
        self,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        base: str | None,
        experts: list[str] | None,
        bases: list[str] | None,
        layout: Layout,
        *settings: Any,
    ) -> list[Any]:
        """Other models: the verdict, fresh sliders, the recipe of the uniform merge."""
        owner, token = self._who(request, profile, oauth)
        try:
            found = self.desk.verdict(base, experts or [], bases or [], owner, token)
        except UnconstrainedError as error:
            words = views.message(str(error), "bad")
            return [None, _layout(layout, None), words, *[gr.skip()] * 6, *self._shown(None, None)]
        fuses = found is not None and found.way != "layerwise"
        need = found is not None and (found.need_base or bool(bases))
        state = chosen(found, settings, ()) if found is not None else None
        return [
            found,
            _layout(layout, found),
            views.verdict(found),
            gr.update(visible=need),
            gr.update(visible=not fuses),
            gr.update(visible=not fuses),
            gr.update(visible=fuses),
            gr.update(visible=not fuses or bool(state and state.weighed)),
            gr.update(visible=fuses),
            *self._shown(state, found),
        ]

    def refresh(self, found: Verdict | None, state: State | None, *values: Any) -> list[Any]:
        """A slider or a setting was moved: recipe, picture and cost follow."""
        if found is None or (state is not None and state.own is not None):
            return [gr.skip()] * 7
        return self._shown(chosen(found, values[:5], values[5:]), found)

    def _shown(self, state: State | None, found: Verdict | None) -> list[Any]:
        if state is None or found is None:
            nothing = views.where(None), views.recipe_state(None), gr.update(interactive=False)
            return [None, "", "", "", *nothing]
        view = self.desk.view(state, found)
        return [
            state,
            view.recipe,
            views.heat_map(view),
            views.cost(view) if not view.problem else "",
            views.where(view),
            views.recipe_state(view),
            gr.update(interactive=view.here),
        ]

    def search(
        self,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        request: gr.Request,
        words: str,
    ) -> list[Any]:
        """Models of the Hub by name, added to the lists."""
        _, token = self._who(request, profile, oauth)
        try:
            names = hub_models.search(words, client(token))
        except UnconstrainedError as error:
            return [views.message(str(error), "bad"), *[gr.skip()] * 3]
        told = f"{len(names)} found; they are in the lists above." if names else "Nothing found."
        choices = gr.update(choices=[*names, *self.desk.choices()])
        return [views.message(told), choices, choices, choices]

    def check_own(
        self,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        text: str,
    ) -> str:
        """A recipe that somebody typed: the first mistake, or that there is none."""
        owner, token = self._who(request, profile, oauth)
        try:
            found, state = self.desk.own(text, owner, token)
            problem = self.desk.view(state, found).problem
        except UnconstrainedError as error:
            return views.message(str(error), "bad")
        return views.message(problem, "bad") if problem else views.message("All right.", "ok")

    def use_own(
        self,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        text: str,
        layout: Layout,
    ) -> list[Any]:
        """A recipe that somebody typed takes the place of the sliders."""
        owner, token = self._who(request, profile, oauth)
        try:
            found, state = self.desk.own(text, owner, token)
        except UnconstrainedError as error:
            return [views.message(str(error), "bad"), *[gr.skip()] * 10]
        return [
            views.message("This recipe counts now; the sliders are set aside.", "ok"),
            found,
            _layout(layout, None),
            views.verdict(found),
            *self._shown(state, found),
        ]

    def commands(self, state: State | None, name: str, repository: str) -> list[str]:
        """What to type elsewhere."""
        if state is None:
            return ["", "", ""]
        try:
            return list(self.desk.commands(state, name, repository))
        except UnconstrainedError as error:
            return [f"# {error}", "", ""]

    def merge(
        self,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        found: Verdict | None,
        state: State | None,
        name: str,
        repository: str,
        private: bool,
        tag: str,
    ) -> Iterator[list[Any]]:
        """Run the merge and show how far it is."""
        owner, token = self._who(request, profile, oauth)
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        if found is None or state is None:
            yield [views.message("Choose models first.", "bad"), "", on, off, *[gr.skip()] * 3]
            return
        try:
            if repository.strip():
                self.desk.check_access(repository, token, private=private)
            for job, seen in self.desk.run(state, found, name, owner, token):
                words = views.progress(
                    seen, job.cancelled, job.out if self.desk.settings.results else None
                )
                log = "\n".join(seen.lines)
                if seen.returncode is None:
                    yield [words, log, off, on, gr.update(visible=False), "", off]
                elif job.succeeded:
                    card = self.desk.card(owner, repository, tag)
                    yield [words, log, on, off, gr.update(visible=True), card, on]
                else:
                    yield [words, log, on, off, gr.update(visible=False), "", off]
        except UnconstrainedError as error:
            yield [views.failure(error), "", on, off, *[gr.skip()] * 3]

    def cancel(
        self,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
    ) -> Any:
        """Stop the merge of whoever asks."""
        self.desk.jobs.cancel(self._who(request, profile, oauth)[0])
        return gr.update(interactive=False)

    def push(
        self,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        repository: str,
        private: bool,
        tag: str,
        checked: bool,
    ) -> str:
        """Push the finished merge with the rights of whoever asks."""
        owner, token = self._who(request, profile, oauth)
        try:
            if not private:
                stop = views.not_public(self.desk.licence(owner, repository), checked)
                if stop:
                    return stop
            url = self.desk.push(
                repository, owner, token, private=private, tag=tag, acknowledged=checked
            )
        except UnconstrainedError as error:
            return views.failure(error)
        return views.pushed(url)

    def card(
        self,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        repository: str,
        tag: str,
    ) -> Any:
        """The card with the name and the tag that were typed, where there is one."""
        try:
            return self.desk.card(self._who(request, profile, oauth)[0], repository, tag)
        except UnconstrainedError:
            return gr.skip()

    def leave(self, request: gr.Request) -> None:
        """The tab is gone: what nobody can see any more is stopped and removed."""
        self.desk.jobs.leave(f"tab:{request.session_hash}")


def _layout(before: Layout, found: Verdict | None) -> Layout:
    """The sliders to draw; the number makes them new ones although the names are the same."""
    groups = []
    for group in found.groups if found is not None else ():
        if found is not None and group.merged:
            title = "" if len(found.groups) == 1 else f"merged from {group.base}"
            groups.append((title, group.kinds, group.experts, round(1 / len(group.experts), 4)))
    return before[0] + 1, tuple(groups)


def settings_of_space() -> Settings:
    """Where an app on the Hub works: in its own folder, for strangers."""
    work = Path(os.environ.get("MERGEKIT_UNCONSTRAINED_SPACE", "space-work")).resolve()
    return Settings(work, work / "models", hosted=bool(os.environ.get("SPACE_ID")))
