"""The codes of defects in a policy's text: reading, syntax, words, values, variables."""

from __future__ import annotations

from policy_dsl.codes.kinds import Code, error

LANGUAGE_CODES: dict[str, Code] = {
    # the text as a whole
    "unreadable-file": error(
        "cannot read {path}: {reason}",
        "The file is missing, too large, not permitted, or something else, such as a pipe.",
        each="path",
    ),
    "unknown-suffix": error(
        "{path} is neither YAML nor DSL",
        "Policies are .yaml or .yml files (YAML) or .qpol files (DSL).",
    ),
    "unknown-policy": error(
        'there is no policy "{name}"', "The name is neither a file nor a bundled policy."
    ),
    "not-utf8": error(
        "{path} is not UTF-8: byte {byte} at offset {offset}", "Policies are UTF-8 text."
    ),
    "too-large": error(
        "{path} is too large: a policy has at most {limit} bytes",
        "A policy is read whole; something this large is not a policy.",
    ),
    "too-many-parts": error(
        "{path} has {count} {what}; a policy has at most {limit}",
        "Reading takes the longer the more there are; `}` counts too. With `extends`, those of "
        "all policies count.",
    ),
    "filled-too-long": error(
        "with its variables filled in, the policy is longer than {limit} characters",
        "A short text can name a long one thousands of times.",
    ),
    "control-character": error(
        "{written} is a control character",
        "Policies are text that is what it looks like: no controls, no marks that turn the "
        "direction of writing.",
    ),
    "empty-policy": error("{path} holds no policy", "The file has no key and no statement."),
    "not-a-policy": error(
        "a policy is a mapping of keys, not {found}", "The YAML text has another form."
    ),
    "cyclic-extends": error(
        "a policy extends itself: {chain}", "Following `extends` comes back to the same policy."
    ),
    # syntax
    "syntax": error(
        "expected {expected}, found {found}", "The statement is not built as the language says."
    ),
    "second-colon": error(
        'a second ":" in one statement; end the statement before it with ";" or a newline',
        "A statement is one selector, a colon and one treatment.",
    ),
    "unclosed-parenthesis": error('"(" is never closed', "Parentheses close in their statement."),
    "unclosed-quote": error("the quote is never closed", "Quoted texts end on their line."),
    "unclosed-block": error(
        'the block "on {target}" is never closed', "A block ends with a closing brace."
    ),
    "stray-brace": error('"}}" closes nothing', "No block is open here."),
    "block-in-rules": error(
        "rules of one target stand under targets.{target}.rules",
        "`on <target> { … }` belongs to DSL files.",
    ),
    "nested-too-deeply": error(
        "nested deeper than {limit}", "Nothing a policy says needs such nesting."
    ),
    "statement-too-long": error(
        "longer than {limit} characters", "The statement or expression is too long to be read."
    ),
    "comment-in-folded-text": error(
        "this comment takes the lines after it, because YAML joins them",
        "In a text begun by `>` or a quote lines are one; in `rules: |` they stay apart.",
    ),
    "not-here": error(
        'expected {expected}, not a "{word}" statement',
        "A statement of another kind stands where only one kind can.",
    ),
    "several-statements": error(
        "several statements in one YAML value",
        "YAML takes the second colon for a mapping; a block text keeps them apart.",
    ),
    # YAML
    "bad-yaml": error("not YAML: {reason}", "The text does not follow YAML's rules."),
    "several-documents": error("a second YAML document begins", "A file holds one policy."),
    "yaml-alias": error(
        "YAML anchors, aliases and merge keys are not used in policies",
        "They can expand without bound; `vars` and `extends` share values.",
    ),
    "yaml-tag": error("YAML tag {tag} is not used in policies", "Policies hold plain values."),
    "bad-key": error("{found} cannot be a key", "Keys are texts."),
    "unknown-key": error('{where} has no key "{key}"', "The key is not one of the language's."),
    "duplicate-key": error("{key} is given twice", "A key is said once."),
    "missing-key": error('{where} needs the key "{key}"', "Something is left unsaid."),
    "wrong-type": error(
        "{key} takes {expected}, not {found}", "The value has another type than the key."
    ),
    "bad-value": error("{key}: {value} is not {reason}", "The value is out of range."),
    "empty-value": error("{key} is empty", "The key holds no text."),
    "bad-policy-name": error(
        'a policy cannot be called "{name}": {reason}',
        "`name` is a plain name: bundles are called after it.",
    ),
    "cleared-and-said": error(
        "{key} is cleared and given in one policy",
        "Clear it in one policy and give its fields in another one that extends it.",
    ),
    "repeated-item": error("{key} names {item} twice", "An item of a list is said once."),
    "ambiguous-word": error(
        "{word} is a truth value in some YAML versions and a text in others", "It may mean either."
    ),
    "bad-json": error("not a JSON value: {reason}", "Values of metadata are JSON."),
    # variables
    "malformed-variable": error(
        '"{written}" is not a variable', "A variable is a name of letters, digits and _ in ${…}."
    ),
    "unknown-variable": error(
        'there is no variable "{name}"', "A variable needs a default under `vars`."
    ),
    "nested-variable": error(
        "a variable's default cannot use a variable", "Defaults are plain values."
    ),
    "variable-in-extends": error(
        "extends cannot use a variable", "What is extended decides which variables there are."
    ),
    "wrong-variable-type": error(
        'variable "{name}" takes {expected}, not "{written}"',
        "A variable keeps the type of its default.",
    ),
    # selectors
    "ambiguous-in": error(
        'it is unclear how much "in" covers',
        "`in` binds tighter than the comma; parentheses say what is meant.",
    ),
    "ambiguous-gate": error(
        '"gate" may be a projection of the experts or the router',
        "Checkpoints use the name for both.",
    ),
    "numbered-name": error(
        "{name} has no numbers; experts have", "Only experts are chosen by number."
    ),
    "negative-expert": error("{written} is not an expert", "Experts count from 0."),
    "empty-range": error("{written} counts backwards", "A range goes from low to high."),
    "bad-boundary": error(
        'boundary takes a number of layers, not "{written}"', "`boundary 2` is 2 at each end."
    ),
    "number-too-large": error("{written} is too large", "Numbers have at most 9 digits."),
    "number-out-of-range": error(
        "{written} is not within {low} and {high}", "The number is too small or too large."
    ),
    "empty-pattern": error("the name pattern is empty", "An empty pattern matches nothing."),
    "bad-regex": error(
        "the {kind} is refused: {reason}",
        "It is malformed, or cannot be matched in time that grows with the name alone.",
    ),
    "unknown-expression-name": error(
        '"{name}" means nothing here; "layers where" knows i and n',
        "i is the layer, n the number of layers.",
    ),
    "division-by-zero": error(
        "{expression} divides by zero for layer {layer} of {n_layers}",
        "The expression has no value for this model.",
    ),
    # treatments, transforms, tests
    "missing-treatment": error("the treatment is missing", "A rule says what happens."),
    "missing-method": error('"by" names no method', "A method follows the word."),
    "unknown-method": error('there is no method "{method}"', "No target has this method."),
    "contradicting-treatment": error(
        '"{other}" cannot stand beside "{one}"',
        "A treatment has one width, one scheme, one of everything.",
    ),
    "optional-otherwise": error(
        "only a rule can be optional", "`otherwise` and tests match nothing by themselves."
    ),
    "unprunable": error("{component} cannot be pruned", "Only experts can."),
    "contradicting-transforms": error(
        "{component} are pruned twice", "One transform says how many remain."
    ),
    "bad-quantity": error(
        "{written} is not a value for {measure}",
        "bpw and bits are plain numbers, size has a unit such as GiB.",
    ),
    "measure-of-nothing": error(
        "{measure} needs a selector in parentheses", "Only bpw and size can be of the whole."
    ),
}
