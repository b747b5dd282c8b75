"""The page's parts in their places, and which handler answers to what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from web.compare import POLICIES, Comparison, Script
from web.compare_panel import compare_panel
from web.page import PARTS, Page
from web.sessions import SYSTEM, Conversation, Session, opening
from web.starters import STARTERS

TICK = 1.0
RETURNS = 2
"""Turns that a comparison asks before the eviction, at least."""
ABOUT = (
    "Conversations that SGLang evicts come back from Krul's store, instead of being computed again"
)
HEADER = (
    '<header class="k-header"><div><h1>Krul for SGLang</h1><p>{about}</p></div>'
    '<div class="k-right">{status}'
    '<button type="button" class="k-theme" aria-label="Light or dark">'
    '<svg viewBox="0 0 20 20" aria-hidden="true"><circle cx="10" cy="10" r="7"/>'
    '<path d="M10 3a7 7 0 0 1 0 14z"/></svg></button></div></header>'
)
CLICK_CARD = """
element.addEventListener('click', (event) => {
  const card = event.target.closest('button[data-key]');
  if (card) trigger('select', {key: card.dataset.key});
});
element.addEventListener('keydown', (event) => {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  const card = event.target.closest('button[data-key]');
  if (!step || !card) return;
  const next = step > 0 ? card.nextElementSibling : card.previousElementSibling;
  if (next) next.focus();
  event.preventDefault();
});
let focused = null;
element.addEventListener('focusin', (event) => {
  focused = event.target.dataset.key || null;
});
element.addEventListener('focusout', (event) => { if (event.relatedTarget) focused = null; });
watch('value', () => {
  if (focused && (document.activeElement === document.body || !document.activeElement)) {
    const card = element.querySelector(`button[data-key="${focused}"]`);
    if (card) card.focus({preventScroll: true});
  }
});
"""
CLICK_QUESTION = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('select', {text: button.innerText});
});
"""
CLICK_THEME = """
element.addEventListener('click', (event) => {
  if (!event.target.closest('.k-theme')) return;
  const dark = document.body.classList.toggle('dark');
  try { localStorage.setItem('krul-theme', dark ? 'dark' : 'light'); } catch (error) {}
});
"""
ON_LOAD = """
() => {
  document.documentElement.lang = 'en';
  let chosen = null;
  try { chosen = localStorage.getItem('krul-theme'); } catch (error) {}
  if (chosen) document.body.classList.toggle('dark', chosen === 'dark');
  let place = 0, still = 0;
  const show = () => {
    const chat = document.querySelector('#chat');
    const at = chat && chat.offsetHeight > 400 ? chat.getBoundingClientRect().top : 0;
    still = at && at === place ? still + 1 : 0;
    place = at;
    if (still > 2) document.documentElement.classList.add('k-ready');
    else setTimeout(show, 80);
  };
  show();
}
"""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


GREY = gr.themes.Color(
    c50="#f7faf8",
    c100="#eef3f0",
    c200="#dbe3df",
    c300="#c3cec9",
    c400="#a3b4ae",
    c500="#61716b",
    c600="#4b5a55",
    c700="#35433e",
    c800="#1e2925",
    c900="#141c19",
    c950="#0c1210",
    name="grey",
)


def theme() -> gr.themes.Base:
    """Gradio's plain theme; its fonts come with it, so no network is needed.

    "Plex" and its weights 400 and 700 are named in the style sheet.
    """
    made = gr.themes.Base(
        primary_hue="teal",
        neutral_hue=GREY,
        radius_size="md",
        font=("Plex", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return made.set(
        # White on the hue's own 500 is too faint to read.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        color_accent="*primary_700",
        button_large_text_weight="700",
        button_medium_text_weight="700",
        button_secondary_background_fill_dark="*neutral_800",
        block_title_text_weight="400",
        block_background_fill_dark="*neutral_900",
        background_fill_primary_dark="*neutral_900",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_300",
        input_border_width="1px",
        checkbox_label_background_fill_dark="*neutral_800",
        border_color_primary_dark="*neutral_800",
        border_color_accent_subdued_dark="*neutral_700",
        color_accent_soft_dark="*neutral_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


STYLE = Path(__file__).with_name("style.css")
HEAD = """
<style>
html:not(.k-ready) gradio-app { visibility: hidden; animation: k-show 0s 15s forwards; }
html:not(.k-ready) body::before { content: "Loading"; position: fixed; inset: 45% 0 auto;
  text-align: center; font: 16px system-ui, sans-serif; color: #61716b; }
@keyframes k-show { to { visibility: visible; } }
</style>
"""
"""Gradio applies style sheets only after it has drawn everything, and then all of it moves: the
page is shown when :data:`ON_LOAD` finds it in place."""


def build(page: Page, comparison: Comparison) -> gr.Blocks:
    """The app; launch it with :func:`theme`, :data:`STYLE` and :data:`HEAD`."""
    first = page.draw(Session())  # what is there before the first event, so that nothing moves
    with gr.Blocks(title="Krul for SGLang", fill_width=True, analytics_enabled=False) as app:
        parts: dict[str, Any] = {}
        parts["status"] = gr.HTML(
            first["status"], elem_id="status", js_on_load=CLICK_THEME, html_template=_header()
        )
        parts["note"] = gr.HTML(first["note"], elem_id="note", js_on_load=None)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat"):
                controls = _chat(parts, first)
            with gr.Tab("Compare policies"):
                compare = _compare(comparison)
        timer = gr.Timer(TICK)
        outputs = [parts[name] for name in PARTS]
        _bind_chat(app, page, controls, parts, outputs, timer)
        _bind_compare(page, comparison, compare)
        app.unload(_unload(page))
    app.queue(default_concurrency_limit=32, max_size=256)
    return app


def _header() -> str:
    return HEADER.format(about=ABOUT, status="${value}")


def _chat(parts: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The chat tab; fills ``parts`` and returns what visitors operate."""
    made: dict[str, Any] = {}
    parts["pool"] = gr.HTML(first["pool"], elem_id="pool", js_on_load=None)
    with gr.Row(elem_classes="k-columns", equal_height=False):
        with gr.Column(scale=3, min_width=250, elem_classes="k-side"):
            parts["cards"] = gr.HTML(first["cards"], elem_id="cards", js_on_load=CLICK_CARD)
            made["new"] = gr.Button("New conversation", size="md", elem_id="new")
            made["press"] = gr.Button(
                "Create memory pressure", variant="primary", size="md", elem_id="press"
            )
            made["auto"] = gr.Checkbox(
                label="Automatically, when idle for 10 s", value=False, elem_id="auto"
            )
            made["measure"] = gr.Checkbox(
                label="Measure the recompute too", value=True, elem_id="measure"
            )
        with gr.Column(scale=6, min_width=320, elem_classes="k-middle"):
            parts["document"] = gr.HTML(first["document"], elem_id="document", js_on_load=None)
            parts["chat"] = gr.Chatbot(
                label="Chat",
                show_label=False,
                height=440,
                elem_id="chat",
                buttons=[],
                layout="bubble",
                placeholder="Ask the first question.",
                feedback_options=None,
            )
            with gr.Row(elem_classes="k-ask", equal_height=True):
                made["text"] = gr.Textbox(
                    label="Your message",
                    show_label=False,
                    placeholder="Your message",
                    lines=1,
                    max_lines=4,
                    scale=6,
                    min_width=180,
                    elem_id="message",
                    container=False,
                )
                made["send"] = gr.Button("Send", scale=1, min_width=84, elem_id="send")
            parts["suggest"] = gr.HTML(
                first["suggest"], elem_id="suggest", js_on_load=CLICK_QUESTION
            )
        with gr.Column(scale=5, min_width=300, elem_classes="k-facts"):
            parts["turn"] = gr.HTML(first["turn"], elem_id="turn", js_on_load=None)
    with gr.Row(elem_classes="k-panels", equal_height=True):
        for name in ("lanes", "strategy"):
            with gr.Column(min_width=330):
                parts[name] = gr.HTML(first[name], elem_id=name, js_on_load=None)
    with gr.Row(elem_classes="k-panels", equal_height=True):
        for name in ("storage", "similarity"):
            with gr.Column(min_width=330):
                parts[name] = gr.HTML(first[name], elem_id=name, js_on_load=None)
    return made


def _bind_chat(
    app: gr.Blocks,
    page: Page,
    controls: dict[str, Any],
    parts: dict[str, Any],
    outputs: list[Any],
    timer: gr.Timer,
) -> None:
    text, measure = controls["text"], controls["measure"]

    def shown(session_name: str) -> list[Any]:
        new = page.changes(page.session(session_name))
        return [new.get(name, gr.skip()) for name in PARTS]

    def load(request: gr.Request) -> list[Any]:
        page.observer.look()
        return shown(_name(request))

    def tick(automatic: bool, request: gr.Request) -> list[Any]:
        page.tick(page.session(_name(request)), automatic)
        return shown(_name(request))

    def ask(question: str, measured: bool, request: gr.Request) -> Iterator[list[Any]]:
        name = _name(request)
        if page.session(name).current.running or not question.strip():
            yield [gr.skip(), *shown(name)]  # it stays in its box until the answer is complete
            return
        yield ["", *shown(name)]
        for _ in page.ask(page.session(name), question, measured):
            yield [gr.skip(), *shown(name)]  # the next message may be half written

    def suggested(measured: bool, request: gr.Request, event: gr.EventData) -> Iterator[list[Any]]:
        yield from ask(event.text, measured, request)

    def choose(request: gr.Request, event: gr.EventData) -> list[Any]:
        session = page.session(_name(request))
        if event.key in session.conversations:
            session.active = event.key
        return shown(_name(request))

    def begin(request: gr.Request) -> list[Any]:
        session = page.session(_name(request))
        session.active = session.open().key
        return shown(_name(request))

    def press(request: gr.Request) -> Iterator[list[Any]]:
        name = _name(request)
        session = page.session(name)
        session.current.notice = ""
        thread = page.start_pressure(session)
        if thread is None and not page.pressure.busy:
            gr.Info("None of your conversations is idle on the device.")
        while page.pressure.busy or (thread is not None and thread.is_alive()):
            yield shown(name)
            time.sleep(0.3)
        yield shown(name)

    more: dict[str, Any] = {**QUIET, "trigger_mode": "multiple"}
    app.load(load, None, outputs, js=ON_LOAD, **QUIET)
    timer.tick(tick, controls["auto"], outputs, **QUIET)
    gr.on([text.submit, controls["send"].click], ask, [text, measure], [text, *outputs], **more)
    parts["suggest"].select(suggested, measure, [text, *outputs], **more)
    parts["cards"].select(choose, None, outputs, **more)
    controls["new"].click(begin, None, outputs, **more)
    controls["press"].click(press, None, outputs, **QUIET)


def _compare(comparison: Comparison) -> dict[str, Any]:
    made: dict[str, Any] = {}
    gr.HTML(
        "<p class='k-lead'>The conversation on the screen, asked again on one server a policy: its "
        "turns, then other visitors until it is evicted, then the next questions. Each server "
        "takes about half a minute to start and some 3 GB of memory while it runs.</p>",
        js_on_load=None,
    )
    with gr.Row(elem_classes="k-columns", equal_height=False):
        made["policies"] = gr.CheckboxGroup(
            choices=list(POLICIES[1:]),
            value=list(POLICIES[1:]),
            label="Against recompute",
            elem_id="policies",
            scale=4,
        )
        made["returns"] = gr.Radio(
            choices=[1, 3], value=1, label="Returns measured", elem_id="returns", scale=2
        )
        made["run"] = gr.Button("Compare", variant="primary", elem_id="run", scale=1)
        made["stop"] = gr.Button("Stop", elem_id="stop", scale=1)
    made["table"] = gr.HTML(  # asked for on every load: somebody else's comparison may be under way
        lambda: compare_panel(comparison.outcomes, comparison.problem),
        elem_id="compared",
        js_on_load=None,
    )
    return made


def _bind_compare(page: Page, comparison: Comparison, made: dict[str, Any]) -> None:
    def drawn(problem: str = "") -> str:
        return compare_panel(comparison.outcomes, problem or comparison.problem)

    def run(policies: list[str], returns: int, request: gr.Request) -> Iterator[str]:
        session = page.session(_name(request))
        script = script_of(session.current, int(returns), page.answer_tokens)
        problem = comparison.start(policies, script)
        yield drawn(problem)
        while comparison.running:
            comparison.finished.wait(0.5)
            yield drawn(problem)
        yield drawn(problem)

    made["run"].click(run, [made["policies"], made["returns"]], made["table"], **QUIET)
    made["stop"].click(lambda: comparison.stop(0.1), None, None, **QUIET)


def script_of(one: Conversation, returns: int, answer_tokens: int) -> Script:
    """What a comparison asks: the conversation's own questions, and those that would be next;
    a conversation without a document takes over the first starter's."""
    document, planned = one.document, list(one.questions)
    if not document and not planned:
        document, planned = STARTERS[0].document, list(STARTERS[0].questions)
    asked = [message["content"] for message in one.shown() if message["role"] == "user"]
    questions = [*asked, *(question for question in planned if question not in asked)]
    turns = max(RETURNS, min(len(asked), len(questions) - returns))
    turns = min(turns, len(questions) - 1)
    first, *rest = questions[:turns]
    return Script(
        messages=[{"role": "system", "content": SYSTEM}],
        turns=[opening(document, first), *rest],
        returns=questions[turns : turns + returns],
        answer_tokens=min(answer_tokens, 48),
    )


def _name(request: gr.Request) -> str:
    return str(request.session_hash)


def _unload(page: Page) -> Any:
    def unload(request: gr.Request) -> None:
        page.close(_name(request))

    return unload
