"""Printing and reading are inverse, for any policy, in both notations."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from policy_dsl.diagnostics import SourceText
from policy_dsl.language.parsing import Fragment, substitute
from policy_dsl.language.print_policy import (
    policy_digest,
    print_dsl,
    print_json,
    print_selector,
    print_treatment,
    print_yaml,
)
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.language.read_yaml import read_yaml
from policy_dsl.language.statements import StatementReader
from policy_dsl.policy import (
    CLEARABLE,
    COMPONENTS,
    SINGLE_ROLES,
    WORDS,
    All,
    Boundary,
    Calibration,
    Comment,
    Defaults,
    Family,
    Glob,
    LayerRange,
    Layers,
    LayersWhere,
    Middle,
    Name,
    Output,
    Policy,
    Prune,
    Regex,
    Rule,
    all_of,
    any_of,
    without,
)
from policy_dsl.treatments import Written

EXPRESSIONS = [
    "i < 4",
    "i < n // 8 or (i - n // 8) % 3 == 2",
    "not i % 2",
    "not (i < 3 and n > 5)",
    "0 < i < n - 1",
    "-i + n == -(i - 2)",
    "i - (n - 3) * 2 != 7",
    "(i < 3) == (n < 5)",
]
WORD = st.from_regex(re.compile(r"[a-z][a-z0-9_]{0,8}", re.ASCII), fullmatch=True)
PRINTED = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"])
TEXT = st.text(PRINTED, min_size=1, max_size=30).filter(lambda text: bool(text.strip()))
LINES = st.lists(TEXT | st.just(""), min_size=1, max_size=4).map("\n".join)
TRAPS = st.sampled_from(["${x}", "$${", "no", "007", "1e5", "null", "a: b #c", "True", "- a"])
PROSE = (TEXT | LINES | TRAPS).filter(lambda text: bool(text.strip()))
NUMBERS = st.integers(0, 99)


@st.composite
def ranges(draw, low=-9):
    start, length = draw(st.integers(low, 60)), draw(NUMBERS)
    stop = start + length
    return LayerRange(start, -1 if start < 0 <= stop else stop)


NAMES = st.builds(
    "{}.{}".format, st.sampled_from(sorted(COMPONENTS)), st.sampled_from(["down_proj", "q_proj"])
) | st.sampled_from([*sorted(COMPONENTS), *sorted(SINGLE_ROLES), "w1", "down_proj", "model", "to"])
LEAVES = st.one_of(
    st.just(All()),
    st.just(Middle()),
    st.builds(Name, NAMES),
    st.builds(
        Name,
        st.sampled_from(["experts", "experts.down_proj"]),
        st.lists(ranges(low=0), min_size=1, max_size=3).map(tuple),
    ),
    st.builds(Layers, st.lists(ranges(), min_size=1, max_size=3).map(tuple), st.booleans()),
    st.builds(LayersWhere, st.sampled_from(EXPRESSIONS)),
    st.builds(Boundary, st.integers(1, 9)),
    st.builds(Family, WORD),
    st.builds(Glob, TEXT),
    st.builds(
        Regex, st.sampled_from([r"model/.*\.w[12]", r"a|b#;", r"\d+\\x", r"a|(?:b$){2}", "[/]x"])
    ),
)
SELECTORS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: all_of(*parts)),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: any_of(*parts)),
        st.builds(without, inner, inner),
    ),
    max_leaves=6,
)
OPTIONAL_WIDTH = st.none() | st.integers(1, 16)
QUANTIZED = st.builds(
    Written,
    st.just("quantize"),
    OPTIONAL_WIDTH,
    st.none() | st.sampled_from(sorted(WORDS.schemes)),
    st.none() | st.sampled_from([32, 64, 128]),
    st.none() | st.booleans(),
    st.none() | st.sampled_from(WORDS.methods),
).filter(lambda treatment: treatment != Written("quantize"))
TREATMENTS = (
    QUANTIZED
    | st.sampled_from([Written(action) for action in ("keep", "raw", "drop")])
    | st.sampled_from([Written("cast", dtype=dtype) for dtype in ("f16", "bf16", "f32")])
)
SCALARS = (
    st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.sampled_from(["true", "false", "True", "yes"])
    | TEXT
)
JSON = st.recursive(
    st.none() | st.booleans() | SCALARS | PROSE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
COUNT = st.none() | st.integers(1, 10**6)
MAYBE_TEXT = st.none() | TEXT


@st.composite
def assertions(draw):
    selector, relation = draw(SELECTORS), draw(st.sampled_from(["<=", "<", ">=", ">", "=="]))
    measure = draw(st.sampled_from(["bpw", "size", "bits", "min_bits", "max_bits", "is"]))
    amount = draw(st.sampled_from(["3", "3.25", "90"]))
    if measure == "is":
        text = f"{print_selector(selector)} is {print_treatment(draw(TREATMENTS))}"
    elif measure in ("bpw", "size"):
        unit = draw(st.sampled_from(["", "GiB", "GB", "B"])) if measure == "size" else ""
        text = f"{measure} {relation} {amount}{unit}"
    else:
        text = f"{measure}({print_selector(selector)}) {relation} {amount}"
    source = SourceText("test", f"test {text}")
    statement, _ = substitute(Fragment.whole(source), {})
    read = StatementReader(statement)
    test = read.statement(("test",))
    assert read.findings == [], text
    return test


@st.composite
def apart_ranges(draw):
    """Ascending ranges that do not touch: the one form of a list of numbers."""
    start, found = 0, []
    for gap, length in draw(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=4)):
        start += gap
        found.append(LayerRange(start, start + length))
        start += length + 2
    return tuple(found)


COUNTS = st.integers(0, 20)
PRUNES = st.builds(Prune, to=st.integers(1, 999), by=WORD) | st.builds(Prune, keep=apart_ranges())


@st.composite
def policies(draw):
    targets = tuple(draw(st.lists(st.sampled_from(WORDS.targets), unique=True)))
    rules = [
        Rule(draw(SELECTORS), draw(TREATMENTS), draw(st.booleans()), target=target)
        for target in (None, *targets)
        for _ in range(draw(st.integers(0, 2)))
    ]
    transforms = draw(st.lists(PRUNES, max_size=1))
    anchors = [
        "name",
        "rules",
        "rules[]",
        "",
        "^",
        "vars",
        "tests",
        "tests[0]",
        "runtimes",
        "description",
        "defaults.bits",
        "targets",
    ]
    anchors += [f"rules[{index}]" for index in range(len(rules))]
    comment = st.builds(Comment, st.sampled_from(anchors), TEXT.map("# {}".format), st.booleans())
    policy = Policy(
        name=draw(WORD),
        description=draw(st.just("") | PROSE),
        model=draw(MAYBE_TEXT),
        targets=targets,
        extends=tuple(draw(st.lists(WORD | TEXT, max_size=2, unique=True))),
        vars=tuple(draw(st.dictionaries(WORD, SCALARS, max_size=2)).items()),
        defaults=draw(
            st.builds(
                Defaults,
                scheme=st.none() | st.sampled_from(sorted(WORDS.schemes)),
                bits=OPTIONAL_WIDTH,
                group_size=COUNT,
                symmetric=st.none() | st.booleans(),
                method=st.none() | st.sampled_from(WORDS.methods),
                otherwise=st.none() | TREATMENTS,
            )
        ),
        rules=tuple(rules),
        transforms=tuple(transforms),
        calibration=draw(
            st.builds(
                Calibration,
                imatrix=MAYBE_TEXT,
                awq_alpha=st.none() | st.floats(0, 1),
                awq_scales=st.sampled_from([None, "exact", "upstream"]),
                text=MAYBE_TEXT,
                samples=COUNT,
            )
        ),
        output=draw(st.builds(Output, shard_size=st.sampled_from([None, "5GiB", "5GB"]))),
        fp8_dequant=draw(st.none() | WORD),
        metadata=tuple(draw(st.dictionaries(TEXT, JSON, max_size=3)).items()),
        runtimes=tuple(draw(st.lists(WORD, max_size=2, unique=True))),
        tests=tuple(draw(st.lists(assertions(), max_size=2))),
        comments=tuple(draw(st.lists(comment, max_size=3))),
    )
    unsaid = [key for key in CLEARABLE if getattr(policy, key) == getattr(Policy(name=""), key)]
    cleared = draw(st.sets(st.sampled_from(["tests", *unsaid])))
    return replace(policy, cleared=tuple(key for key in CLEARABLE if key in cleared))


def text_comments(policy: Policy) -> list[str]:
    return sorted(" ".join(each.text.split()) for each in policy.comments if each.text)


@given(policies())
@settings(max_examples=60)
def test_printing_then_reading_is_identity_in_both_notations(policy):
    for printed, read in ((print_yaml, read_yaml), (print_dsl, read_dsl)):
        text = printed(policy)
        again = read(SourceText("p", text), policy.name)
        assert again == policy, text
        assert printed(again) == text
        assert text_comments(again) == text_comments(policy), text
        assert policy_digest(again) == policy_digest(policy)


@given(policies())
@settings(max_examples=30)
def test_formatting_twice_changes_nothing_across_notations(policy):
    yaml = print_yaml(read_yaml(SourceText("p", print_yaml(policy)), policy.name))
    dsl = print_dsl(read_yaml(SourceText("p", yaml), policy.name))
    back = read_dsl(SourceText("p", dsl), policy.name)
    assert back == policy
    assert text_comments(back) == text_comments(policy)
    assert print_dsl(back) == dsl


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_every_bit(value):
    assert float(print_json(value)) == value
