"""``prefcore credit``: its numbers are the models', its text is the data's and only text, and it loads nothing."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from prefcore import cli
from prefcore.cli import credit
from prefcore.cli._credit_page import _STYLE, Pair, Response, ScoredToken, Token, units
from prefcore.cli._credit_page import page as render

CORPUS = ["the cat sat on the mat and the dog sat on the log, naïve 日本 end."] * 3
VOID = {"meta", "input", "br", "img", "link", "base"}
CHROMIUM = os.environ.get("PREFCORE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def byte_level(trim, prefix):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    return made


def byte_fallback():
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return made


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["</s>", "[UNK]"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


TOKENIZERS = {
    "byte level": lambda: byte_level(False, False),
    "byte level, blanks trimmed": lambda: byte_level(True, True),
    "byte fallback": byte_fallback,
    "word piece": word_piece,
}


def save(folder, made, seed):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Directories of a model and its reference, with one tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    made = byte_level(False, False)
    return save(folder / "model", made, 0), save(folder / "ref", made, 1)


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def command(*options):
    return cli.main(["credit", *map(str, options)])


def make(pair, data, output, *options):
    model, ref = pair
    assert command("--model", model, "--ref", ref, "--data", data, "--output", output, *options) == 0
    return Page(output.read_text("utf-8"))


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    def all(self, tag=None, **attributes):
        """Elements below this one, by tag and by single classes or other attributes."""
        for child in self.children:
            if isinstance(child, Node):
                matches = all(
                    value in (child.attributes.get(k.rstrip("_")) or "").split() for k, value in attributes.items()
                )
                if tag in (None, child.tag) and matches:
                    yield child
                yield from child.all(tag, **attributes)

    def text(self, without=()):
        return "".join(
            child if isinstance(child, str) else "" if child.has(*without) else child.text(without)
            for child in self.children
        )

    def has(self, *classes):
        return bool(set(classes) & set((self.attributes.get("class") or "").split()))


class Page(HTMLParser):
    """The tree of a page; an element that is not closed where it must be is an error."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.root = self.node = Node("", {}, None)
        self.feed(source)
        self.close()
        assert self.node is self.root

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.node.children.append(Node(tag, dict(attributes), self.node))
        if tag not in VOID:
            self.node = self.node.children[-1]

    def handle_startendtag(self, tag, attributes):
        self.node.children.append(Node(tag, dict(attributes), self.node))

    def handle_endtag(self, tag):
        assert self.node.tag == tag
        self.node = self.node.parent

    def handle_data(self, data):
        self.node.children.append(data)

    def side(self, pair, name):
        section = next(self.root.all("section", id=f"pair-{pair}"))
        return next(section.all("article", class_=name))

    def body(self, pair, name):
        return next(self.side(pair, name).all("div", class_="text"))

    def given(self, pair, name):
        """Reward, log-prob and reference of each token, as the page's tooltips have them."""
        numbers = re.compile(r"reward (\S+), log-prob (\S+), reference (\S+)$", re.MULTILINE)
        titles = [token.attributes["title"] for token in self.body(pair, name).all("span", class_="t")]
        return [tuple(map(float, found)) for title in titles for found in numbers.findall(title)]

    def sums(self, pair, name):
        return [float(entry.text()) for entry in next(self.side(pair, name).all("dl")).all("dd")]


def dense(folder, prompt, response, dtype=torch.float64):
    """Log-probs of the response and its end, by the whole logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = folder if isinstance(folder, torch.nn.Module) else transformers.AutoModelForCausalLM.from_pretrained(folder)
    return dense_of(model, tokenizer, prompt, response, dtype)


def dense_of(model, tokenizer, prompt, response, dtype=torch.float64):
    context = tokenizer(prompt, add_special_tokens=True).input_ids
    answer = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.to(dtype).eval()(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].double()


PLAIN = {"prompt": "the cat", "chosen": " sat on the mat, naïve 日本.", "rejected": " dog"}
COMPARED = {
    "prompt": "on the log the",
    "responses": [" end. and the dog", " mat", " cat sat"],
    "preferences": [[0, 1, 1], [0, 2, 2], [1, 2, 0]],
}
# Of a float32 model against float64: log-probs below 32, some 32 roundings in a row; and four digits are printed.
ROUNDING = 32 * 32 * 2**-24
DIGITS = 0.5e-4


@pytest.mark.quick
@pytest.mark.parametrize("options", [(), ("--sharing", "off", "--beta", 0.5), ("--max-tokens", 48, "--beta", 2)])
def test_the_numbers_are_those_of_the_whole_logits(tiny, tmp_path, options):
    data = write(tmp_path / "data.jsonl", PLAIN, COMPARED)
    page = make(tiny, data, tmp_path / "page.html", *options)
    beta = float(options[options.index("--beta") + 1]) if "--beta" in options else 0.1
    prompt, answers = COMPARED["prompt"], COMPARED["responses"]
    pairs = [(PLAIN["prompt"], PLAIN["chosen"], PLAIN["rejected"]), (prompt, answers[0], answers[1])]
    pairs.append((prompt, answers[2], answers[0]))
    assert len(list(page.root.all("section"))) == 3
    for number, (prompt, chosen, rejected) in enumerate(pairs, start=1):
        rewards = []
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            logps, ref_logps = (dense(folder, prompt, response) for folder in tiny)
            wanted = torch.stack([beta * (logps - ref_logps), logps, ref_logps], dim=1)
            given = torch.tensor(page.given(number, name), dtype=torch.float64)
            assert given.shape == wanted.shape
            bound = DIGITS + ROUNDING * torch.tensor([2 * beta, 1, 1])
            assert ((given - wanted).abs() <= bound).all()
            total, logp, reference, count = page.sums(number, name)
            assert count == len(logps)
            for value, own, size in zip((total, logp, reference), wanted.sum(0), (2 * beta, 1, 1), strict=True):
                assert abs(value - own.item()) <= DIGITS + ROUNDING * size * len(logps)
            rewards.append(wanted[:, 0].sum().item())
        section = next(page.root.all("section", id=f"pair-{number}"))
        margin = rewards[0] - rewards[1]
        verdict = next(section.all("span", class_="verdict"))
        assert verdict.has("right" if margin > 0 else "wrong")
        assert float(verdict.text().split()[-1]) == pytest.approx(margin, abs=DIGITS + ROUNDING * 4 * beta * 40)


def test_adapters_are_held_against_the_model_without_them(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny[0])
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    data = write(tmp_path / "data.jsonl", PLAIN)
    options = ["--model", tmp_path / "adapter", "--data", data, "--output", tmp_path / "page.html"]
    assert command(*options) == 0
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny[0])
    logps = dense_of(adapted, tokenizer, PLAIN["prompt"], PLAIN["chosen"])
    with adapted.disable_adapter():
        ref_logps = dense_of(adapted, tokenizer, PLAIN["prompt"], PLAIN["chosen"])
    assert (logps - ref_logps).abs().max() > 0.1
    wanted = torch.stack([0.1 * (logps - ref_logps), logps, ref_logps], dim=1)
    given = torch.tensor(page.given(1, "chosen"), dtype=torch.float64)
    assert ((given - wanted).abs() <= DIGITS + ROUNDING).all()


def test_virtual_tokens_of_a_prompt_are_refused(tiny, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny[0])
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    data = write(tmp_path / "data.jsonl", PLAIN)
    assert command("--model", tmp_path / "adapter", "--data", data, "--output", tmp_path / "page.html") == 1
    assert "adds virtual tokens to the input" in capsys.readouterr().err


def test_reference_and_model_are_never_in_memory_together(tiny, tmp_path, monkeypatch):
    alive, names = [], []
    load = credit._Model.load

    def watched(self):
        assert not any(model() is not None for model in alive)
        names.append(self.option)
        model = load(self)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(credit._Model, "load", watched)
    make(tiny, write(tmp_path / "data.jsonl", PLAIN), tmp_path / "page.html")
    assert names == ["--ref", "--model"]


def test_a_prompt_is_run_once_and_so_is_a_response_in_several_pairs(tiny, tmp_path, monkeypatch):
    import prefcore.hf

    score, seen = prefcore.hf.score, []
    monkeypatch.setattr(prefcore.hf, "score", lambda m, p, r, **kwargs: seen.append((p, r)) or score(m, p, r, **kwargs))
    make(tiny, write(tmp_path / "data.jsonl", COMPARED, PLAIN, COMPARED), tmp_path / "page.html")
    assert [[len(responses) for responses in each] for _, each in seen] == [[3, 2]] * 2


TEXT = "The\tcat naïve 🙂日本\n\n sat  e\u0301nd ﬁn."
MARKS = [(4, 7, "a"), (8, 13, "b"), (10, 15, "a"), (14, 15, "c"), (17, 20, "b"), (len(TEXT) - 3, len(TEXT), "d")]


def marked(node, kinds, active=frozenset()):
    """Of each character below a node the kinds by which it is underlined."""
    for child in node.children:
        if isinstance(child, str):
            yield from [active] * len(child)
        elif not child.has("symbol"):
            own = {kinds[int(child.attributes["class"][1:])]} if child.tag == "u" else set()
            yield from marked(child, kinds, active | own)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_marked_passages_are_underlined_to_the_character(kind, tmp_path):
    made = TOKENIZERS[kind]()
    pair = save(tmp_path / "model", made, 0), save(tmp_path / "ref", made, 1)
    record = {
        "prompt": "the",
        "responses": [TEXT, "the dog"],
        "preferences": [[0, 1, 2], [0, 1, 1]],
        "errors": [{"start": start, "end": end, "type": name} for start, end, name in MARKS],
    }
    page = make(pair, write(tmp_path / "data.jsonl", record), tmp_path / "page.html")
    kinds = [entry.text() for entry in next(page.root.all("div", class_="kinds")).all("u")]
    assert kinds == ["a", "b", "c", "d"]
    for number, name in ((1, "rejected"), (2, "chosen")):
        body = page.body(number, name)
        assert body.text(without=("symbol",)) == TEXT
        marks = list(marked(body, kinds))
        assert marks == [{n for start, end, n in MARKS if start <= i < end} for i in range(len(TEXT))]
    assert not list(page.body(1, "chosen").all("u"))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_token_is_on_the_page_once_and_the_bytes_of_a_character_are_together(kind, tmp_path):
    made = TOKENIZERS[kind]()
    pair = save(tmp_path / "model", made, 0), save(tmp_path / "ref", made, 1)
    page = make(pair, write(tmp_path / "d.jsonl", {**PLAIN, "chosen": TEXT}), tmp_path / "page.html")
    count = len(made.encode(TEXT, add_special_tokens=False).ids) + 1
    assert len(page.given(1, "chosen")) == count
    spans = list(page.body(1, "chosen").all("span", class_="t"))
    assert sum(span.text().count("🙂") for span in spans) == 1
    assert spans[-1].text() == "</s>"
    assert spans[-1].has("symbol")
    assert "".join(span.text() for span in spans if not span.has("symbol")) in TEXT


def test_tokens_that_share_characters_are_together_and_blanks_go_to_the_token_after_them():
    tokens = [Token(str(n), where) for n, where in enumerate([(0, 1), (0, 1), (2, 4), (3, 5), (6, 6), (7, 9), None])]
    found = units(Response("a bcd\n\n..!?", tokens))
    assert [(unit.start, unit.end) for unit in found] == [(0, 1), (1, 5), (5, 6), (6, 9), (9, 9)]
    assert [[token.name for token in unit.tokens] for unit in found] == [["0", "1"], ["2", "3"], ["4"], ["5"], ["6"]]


HOSTILE = [
    "</script><script>document.body.dataset.owned=1;alert(1)</script>",
    "<img src=x onerror=document.body.dataset.owned=1>\"' onmouseover='alert(1)' title=\"",
    "--><!-- ]]> </style><style>*{display:none}</style> &lt;b&gt; &amp; &#x202e;",
    "</div></article></section></body></html>",
    "\u202eevil\u202c \u2066x\u2069 \u200f",
    "zero\u200bwidth\ufeff\u200d\u2060\u00ad",
    "\x1b[31mred\x1b[0m \x07\x00\x08\r\r\n\x7f\x9b \u2028\u2029",
    "\ufffe\uffff\ufdd0\U0001ffff\U000e0041",
    "javascript:alert(1) {{7*7}} ${alert(1)}",
    "w" * 5000,
    "e" + "\u0301" * 300,
]
ELEMENTS = set(
    """
    a article b bdi body code dd details div dl dt figcaption figure footer h1 h2 h3 head header html i input
    label li line main meta nav p polyline script section small span style sub summary svg title u ul
    """.split()  # noqa: SIM905
)
ATTRIBUTES = set(
    """
    aria-label charset class content data-verdict dir hidden href http-equiv id lang name points
    preserveaspectratio rel role title type viewbox x1 x2 y1 y2
    """.split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def hostile(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    records = [{"prompt": text, "chosen": f"a {text} z", "rejected": f"{text}."} for text in HOSTILE]
    errors = [{"start": 0, "end": 4, "type": text} for text in HOSTILE[:7]]
    records.append({"prompt": "p", "responses": HOSTILE[:2], "preferences": [[0, 1, 1]], "errors": errors})
    data = write(folder / "<b onclick=alert(1)>&\"'.jsonl", *records)
    output = folder / "page.html"
    return make(tiny, data, output, "--max-length", 300), output, data


def test_hostile_text_is_only_text(hostile):
    page, _, data = hostile
    for node in page.root.all():
        assert node.tag in ELEMENTS
        assert node.attributes.keys() <= ATTRIBUTES
        assert node.attributes.get("href", "#").startswith("#")
    assert len(list(page.root.all("script"))) == len(list(page.root.all("style"))) == 1
    # What can be seen comes back as it was; what cannot is named.
    unseen = re.compile(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff\ufdd0\U0001ffff\U000e0041]"
    )
    for number, text in enumerate(HOSTILE, start=1):
        wanted = unseen.sub(lambda found: f"U+{ord(found.group()):04X}", text)
        body = page.body(number, "rejected").text(without=("symbol",))
        assert body == wanted + "."
        section = next(page.root.all("section", id=f"pair-{number}"))
        assert next(next(section.all("details")).all("div")).text() == wanted
    assert not unseen.search(page.source)
    assert data.name in next(page.root.all("p", class_="about")).text()
    kinds = [entry.text() for entry in next(page.root.all("div", class_="kinds")).all("u")]
    assert kinds == [unseen.sub(lambda found: f"U+{ord(found.group()):04X}", text) for text in HOSTILE[:7]]
    assert data.name not in page.source


@pytest.mark.quick
def test_the_page_loads_nothing_and_runs_its_own_script_alone(hostile):
    page, _, _ = hostile
    policy = next(node for node in page.root.all("meta") if node.attributes.get("http-equiv"))
    assert policy.attributes["http-equiv"] == "Content-Security-Policy"
    allowed = dict(part.split(" ", 1) for part in policy.attributes["content"].split("; "))
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    for name in ("style", "script"):
        text = next(page.root.all(name)).text()
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[f"{name}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"url\(|@import|https?:|//[a-z]", _STYLE)
    first_script = page.source.index("<script>")
    assert page.source.index("Content-Security-Policy") < page.source.index("<style>") < first_script
    ids = [node.attributes["id"] for node in page.root.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in page.root.all("a"):
        assert node.attributes["href"][1:] in ids
    assert page.source.startswith("<!DOCTYPE html>\n")


def test_shades_leave_text_readable_and_signs_apart():
    """WCAG's contrast of 4.5 for the text on the strongest shades, light and dark."""
    both = [
        dict(re.findall(r"--([a-z]+): ([^;]+);", part)) for part in _STYLE.split("@media (prefers-color-scheme: dark)")
    ]
    light = both[0]
    dark = light | both[1]
    assert light["fg"] != dark["fg"]

    def rgb(text):
        if text.startswith("#"):
            digits = text[1:] if len(text) == 7 else "".join(digit * 2 for digit in text[1:])
            return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
        return list(map(int, text.split()))

    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    strongest = max(float(alpha) for alpha in re.findall(r"rgb\(var\(--[pn]\)\s*/\s*([\d.]+)\)", _STYLE))
    for theme in (light, dark):
        for sign in "pn":
            mixed = [
                strongest * c + (1 - strongest) * k for c, k in zip(rgb(theme[sign]), rgb(theme["card"]), strict=True)
            ]
            brighter, darker = sorted((luminance(mixed), luminance(rgb(theme["fg"]))), reverse=True)
            assert (brighter + 0.05) / (darker + 0.05) >= 4.5


def test_equal_models_are_tied_and_nothing_is_shaded(tiny, tmp_path):
    data = write(tmp_path / "data.jsonl", PLAIN)
    page = make((tiny[0], tiny[0]), data, tmp_path / "page.html")
    assert next(page.root.all("span", class_="verdict")).text() == "tied, margin +0.0000"
    assert all(node.has("zero") for node in page.body(1, "chosen").all("span", class_="t"))


def test_log_probs_that_are_not_finite_are_said():
    tokens = [ScoredToken("a", (0, 1), math.nan, -1.0), ScoredToken("b", (1, 2), -math.inf, -1.0), Token("c", (2, 3))]
    given = Pair("p", Response("abc", tokens), Response("b", [ScoredToken("b", (0, 1), -math.inf, -math.inf)]))
    shown = Page(render([given], beta=0.1, model="m", reference="r", data="d"))
    assert next(shown.root.all("span", class_="verdict")).text() == "undefined, margin +nan"
    assert [node.attributes["class"] for node in shown.body(1, "chosen").all("span")] == ["t nan", "t n12", "t off"]
    assert not list(shown.root.all("figure"))
    one = Response("a", [ScoredToken("a", (0, 1), -math.inf, 0.0)])
    infinite = Page(render([Pair("", one, one)], beta=1, model="m", reference="r", data="d"))
    assert next(infinite.root.all("span", class_="verdict")).has("undefined")


def test_what_is_cut_off_or_not_the_assistants_is_there_and_not_scored(tiny, tmp_path):
    page = make(tiny, write(tmp_path / "data.jsonl", PLAIN), tmp_path / "page.html", "--max-response-length", 3)
    assert page.body(1, "chosen").text() == PLAIN["chosen"]
    assert next(page.body(1, "chosen").all("span", class_="cut")).text()
    assert len(page.given(1, "chosen")) == 3

    chat = transformers.AutoTokenizer.from_pretrained(tiny[0])
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    for folder in tiny:
        shutil.copytree(folder, tmp_path / folder.name)
        chat.save_pretrained(tmp_path / folder.name)
    say = lambda role, content: {"role": role, "content": content}
    record = {
        "prompt": [say("user", "the cat")],
        "chosen": [say("assistant", "sat"), say("user", "on"), say("assistant", "the mat")],
        "rejected": [say("assistant", "dog")],
    }
    data = write(tmp_path / "chat.jsonl", record)
    page = make((tmp_path / "model", tmp_path / "ref"), data, tmp_path / "page.html")
    body = page.body(1, "chosen")
    assert body.text() == "[assistant] sat\n[user] on\n[assistant] the mat\n"
    unscored = "".join(node.text() for node in body.all("span", class_="off"))
    assert "[user] on\n" in unscored
    assert "the mat" not in unscored
    assert "sat" not in unscored
    assert next(next(page.root.all("details")).all("div")).text() == "user: the cat"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ref", None], "--ref is missing: .* is a whole model, and only adapters of PEFT can be disabled"),
        (["--ref", "/nowhere/model"], "--ref /nowhere/model: no such directory"),
        (["--model", "/nowhere/model"], "--model /nowhere/model: no such directory"),
        (["--data", "/nowhere/data"], "/nowhere/data: cannot be read"),
        (["--output", "/nowhere/page.html"], "--output /nowhere/page.html: cannot be written"),
        (["--output", "/"], "--output /: cannot be written"),
        (["--max-length", 513], "--max-length 513: .* has 512 positions"),
        (["--max-length", 1], "max_length must be at least 2"),
        (["--max-tokens", 8], "--max-tokens 8: the longest prompt with a response has"),
        (["--sharing", "off", "--attention", "sdpa"], "with --sharing off the model's own attention runs"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(tiny, tmp_path, monkeypatch, capsys, options, text):
    monkeypatch.setattr(credit._Model, "load", lambda self: pytest.fail("loaded"))
    given = {"--model": tiny[0], "--ref": tiny[1], "--data": write(tmp_path / "data.jsonl", PLAIN)}
    given |= {"--output": tmp_path / "page.html"} | dict(zip(options[::2], options[1::2], strict=True))
    assert command(*(part for item in given.items() if item[1] is not None for part in item)) == 2
    assert re.search(f"^prefcore credit: error: .*{text}", capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.quick
def test_help_needs_neither_transformers_nor_triton():
    code = (
        "import sys\nfrom prefcore.cli import main\n"
        "for words in (['--help'], ['credit', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit: pass\n"
        "assert not {'transformers', 'triton', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-pairs" in done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome, and no PREFCORE_CHROMIUM")
def test_a_browser_shows_the_page_and_runs_nothing_of_the_data(hostile, tmp_path):
    page, output, _ = hostile
    shown = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            output.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.findall(r".*(?:CONSOLE|Uncaught|Refused to).*", shown.stderr)
    dom = Page(shown.stdout)
    (body,) = dom.root.all("body")
    assert "data-owned" not in body.attributes
    assert next(dom.root.all("div", id="tip")).attributes["role"] == "tooltip"  # so the script ran to its end:
    assert "hidden" not in next(dom.root.all("label", id="filter")).attributes
    assert len(list(dom.root.all("a", class_="here"))) == 1
    before, after = (
        [(node.tag, node.attributes.get("id")) for node in next(tree.root.all("main")).all()] for tree in (page, dom)
    )
    assert after == before
    for number in range(1, len(HOSTILE) + 1):
        for name in ("chosen", "rejected"):
            assert dom.body(number, name).text() == page.body(number, name).text()
