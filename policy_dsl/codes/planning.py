"""The codes of policies that meet a model and a target, and of what asks for plans."""

from __future__ import annotations

from policy_dsl.codes.kinds import Code, error, warning

PLANNING_CODES: dict[str, Code] = {
    # the vocabulary
    "unknown-role": error(
        '{where} has no role "{role}"',
        "The name is no component, projection, role or alias of the architecture.",
    ),
    # a policy against a model and a target
    "not-the-boundary": warning(
        "these layers are not the boundary of a model of {n_layers} layers",
        "`boundary layers …` says as many first layers as last ones; here it does not.",
    ),
    "middle-without-boundary": error(
        "`middle` needs exactly one boundary in the policy, which has {count}",
        "`middle` is the complement of the policy's one `boundary`.",
    ),
    "unknown-family": error(
        'there is no family "{family}"', "`policyc formats` lists the model families."
    ),
    "number-outside-model": error(
        "{written} outside the model, which has {has}",
        "Layers and experts count from 0; negative numbers count from the end.",
    ),
    "matches-nothing": error(
        "the rule touches no tensor of {model}",
        "The selector means nothing in this model, or only tensors that it may not touch.",
    ),
    "pattern-matches-nothing": error(
        "no tensor of {model} has a name like {pattern}",
        "Name patterns and regular expressions are matched against whole names of the source. "
        "Wherever it is in a selector, each must match something, unless the rule is "
        "`optional`.",
    ),
    "part-matches-nothing": error(
        "{part} matches nothing of {model} beside the rest of the selector",
        "A name pattern or a number is written for one model: where the rest of its selector "
        "leaves it nothing, or only tensors that it may not touch, one of the two is wrong.",
    ),
    "pattern-takes-more": warning(
        "{pattern} also takes {numbers}",
        "A star continues a number: `layers.1*` is layer 1 and layers 10 to 19. A dot ends it.",
    ),
    "tied-head-left-out": warning(
        "{name} is left out ({nbytes}): the model is tied, and readers use {embedding}; a "
        "build stops if their values differ",
        "The config, or what its library assumes, says that the embedding is the head, and the "
        "checkpoint has both. A rule that names `lm_head` stores it, and config.json then says "
        "`tie_word_embeddings: false`.",
    ),
    "rule-without-effect": warning(
        "the rule decides {tensors} that {target} leaves out: {reason}",
        "The rule names what the target has no place for; `drop` says that this is meant. In a "
        "policy for several targets, `on TARGET { … }` holds rules of one.",
    ),
    "tied-lm-head": warning(
        "lm_head is tied to embed in this model: the rule has nothing to decide",
        "A tied head has no tensor of its own; the rule for embed decides.",
    ),
    "shadowed-rule": warning(
        "all that this rule matches ({tensors}) is decided by {rules}",
        "The last rule that matches decides; this rule decides nothing.",
    ),
    "unreached-matrices": warning(
        "no rule reaches {matrices} ({roles}); `otherwise` decides: {nbytes}",
        "Matrices that no rule names are often forgotten ones.",
    ),
    "dropped-tensors": warning(
        "{roles} of the language model is left out; readers of {target} may refuse the bundle",
        "`drop` is for towers and heads that nobody reads.",
    ),
    "router-quantized": warning(
        "the policy quantizes {routers}", "Routers are small and choose the experts."
    ),
    "larger-than-source": warning(
        "{outputs} larger than the source: {before} become {after}",
        "More bits for each value than the source has cost bytes and gain nothing.",
    ),
    "no-target": error(
        "policy {policy} does not say which target to plan for; choose --target: {choices}",
        "A policy with no target or several needs --target.",
    ),
    "unknown-target": error(
        'there is no target "{target}"; there are {known}', "Targets are bundle formats."
    ),
    "unavailable-target": error(
        "this version of policyc cannot write {target} yet; it writes {known}",
        "The language knows the target, the program has no emitter for it.",
    ),
    "already-quantized": error(
        "{model} is already quantized ({form})",
        "Quantizing twice adds two errors, and most forms of other tools are not read as "
        "sources. Releases in FP8 or MXFP4 are not meant.",
    ),
    "requantized": warning(
        "{model} is already quantized ({form}): its error and this one add up",
        "The source is a copy in FP8 that a tool made, or --allow-requantize allows it.",
    ),
    "unsupported-family": error(
        "{target} does not take family {family}: {reason}",
        "The bundle would not load; refused before work starts.",
    ),
    "unknown-runtime": warning(
        '{target} knows no reader "{runtime}"; it knows {known}',
        "What a reader of the format cannot load is only told for readers that are known.",
    ),
    "unused-setting": warning(
        "{target} does not use `{setting}`",
        "The setting is for another target; for this one it changes nothing.",
    ),
    "unknown-layout": error(
        '{target} has no layout "{layout}"; it has {known}',
        "`output layout` chooses how a target stores experts, where it has a choice.",
    ),
    "bad-file-name": error(
        'the file cannot be called "{name}": {reason}',
        "`output file_name` is a plain name, and none that the bundle has for another file.",
    ),
    "bad-metadata-value": error(
        "metadata {key} cannot be {value}; it is {wanted}",
        "The value goes into the bundle, and its readers take no other.",
    ),
    "runtime-refuses": warning(
        "{runtime} cannot load this bundle: {reason}",
        "`runtimes` names the readers that matter; a plan lists the others under "
        '"Readers that cannot load it".',
    ),
    "runtime-cannot": error(
        "{runtime} cannot hold this: {reason}",
        "The policy names this reader in `runtimes`; take the name out if another one will do.",
    ),
    "no-reader": error(
        "no reader of {target} ({readers}) can load {model}: {reason}",
        "What the model's config means cannot be written in the keys that readers look for, "
        "or they do not compute it. Take another target.",
    ),
    "experts-added": warning(
        "{target} adds {experts} to the {count} of every layer: {nbytes}",
        "The target's readers want a multiple; the router never chooses an added expert. "
        "`output pad_experts false` leaves them out.",
    ),
    "experts-not-added": warning(
        "{target} adds no experts to models of family {family}",
        "`output pad_experts true` asks for them; readers of these models want no multiple.",
    ),
    "unknown-fp8-rule": error(
        'there is no FP8 rule "{rule}"; there are {rules}',
        "How FP8 weights are rounded when they are dequantized.",
    ),
    "prune-count": error(
        "experts cannot be pruned to {to}: the model has {count}",
        "Pruning keeps at least one expert and at most all.",
    ),
    "prune-below-routed": error(
        "experts cannot be pruned to {to}: {key} says that every token gets {routed} of them",
        "Readers choose that many experts for a token, so as many have to stay.",
    ),
    "prune-in-groups": error(
        "experts of {model} cannot be pruned: its router chooses among {groups} groups of "
        "them ({key})",
        "Groups are experts with neighbouring numbers: without some of them, experts change "
        "their group, and the model's routing another meaning.",
    ),
    "prune-beside-mtp": error(
        "MTP blocks have experts of their own, which no saliency ranks: {count} tensors such "
        "as {name}",
        "Readers build MTP blocks with as many experts as all others.",
    ),
    "unsupported-dtype": error(
        "{target} does not store {dtype}; it stores {held}", "Plain dtypes of the target."
    ),
    "unknown-scheme": error('there is no scheme "{scheme}"', "No target has this scheme."),
    "foreign-scheme": error(
        "scheme {scheme} belongs to target {homes}, not to {target}",
        "Schemes are bound to the formats that store them.",
    ),
    "missing-bits": error(
        "{scheme} needs a width: {widths}", "The scheme stores several widths and none is given."
    ),
    "unsupported-bits": error(
        "{target} cannot store {scheme} at {bits} bits; it has {widths}",
        "The target's readers know no such width.",
    ),
    "unsupported-group-size": error(
        "{target} cannot store {scheme} in groups of {group_size}; it has {sizes}",
        "The target's readers know no such group size.",
    ),
    "unsupported-method": error(
        "{target} has no method {method} for {scheme}; it has {methods}",
        "The method does not go with the scheme.",
    ),
    "no-symmetric-choice": error(
        "{scheme} of {target} is neither `sym` nor `asym`: leave it out",
        "The scheme has one way of storing zero.",
    ),
    "unsupported-source-layout": error(
        "{target} cannot take {role} from this source: its rows are interleaved, transposed or "
        "packed",
        "The source stores the matrix in an order that this target's build does not undo.",
    ),
    "raw-unreadable": error(
        "readers of {target} cannot use the source's {dtype} bytes as they are",
        "`raw` copies bytes; the target's readers must know the dtype.",
    ),
    "not-a-matrix": error(
        "{role} of shape {shape} is not a matrix and cannot be quantized",
        "Only matrices are quantized.",
    ),
    "unsupported-treatment": error(
        "{target} cannot store {roles} as {treatment}: {reason}",
        "The target's readers would refuse the tensor, or misread it.",
    ),
    "conflict": error(
        "{target}: {reason}",
        "Treatments that are right by themselves, and that readers cannot take together.",
    ),
    "group-does-not-divide": error(
        "groups of {group_size} do not divide the {columns} columns",
        "Groups lie along the last axis and may not be split.",
    ),
    "mixed-stack": error(
        "experts of one stack are treated differently: {one}, {other}",
        "The target stores all experts of a projection in one tensor of one width.",
    ),
    "partial-stack": error(
        "a stack is left with {kept} of its {count} experts",
        "The router chooses among all experts by their numbers: dropping some of them makes a "
        "model that answers nonsense.",
    ),
    "uneven-stack": error(
        "experts of one stack have shapes {one} and {other}",
        "The target stores all experts of a projection in one tensor.",
    ),
    # the plan's own tests, saved plans, the command line
    "test-failed": error(
        "the test `{test}` fails: it is {found}", "An assertion of the policy does not hold."
    ),
    "test-without-tensors": error(
        "the test `{test}` is about no tensor of this plan",
        "A test that measures nothing proves nothing.",
    ),
    "bad-saved-plan": error(
        "{path} is not a saved plan: {reason}", "Saved plans are what `policyc plan --save` writes."
    ),
    "too-many-rules": error(
        "the policy has {rules} rules; for this model it may have {most}",
        "Each rule is compared with each layer: at most 5,000,000 times in all. Rules that say "
        "the same of many layers or names can be one.",
    ),
    "too-much-to-match": error(
        "patterns and numbers of experts match too much of a model of {names} names",
        "Each is compared with each name that it may mean. Roles, components and layers are "
        "not, and one pattern can say what many do.",
    ),
    "bad-argument": error("{option}: {reason}", "An option's value is not what it must be."),
    "unwritable-output": error(
        "cannot write {path}: {reason}", "The folder is missing, full, or not permitted."
    ),
    "system-refused": error(
        "{path}: {reason}", "The system refused to read or write: not permitted, full, missing."
    ),
    "no-model": error(
        "policy {policy} names no model: give one with --model",
        "Planning needs headers: a folder, a recorded headers file, a hub id, a catalog name.",
    ),
    "unknown-tensor": error(
        '{model} has no tensor "{name}"',
        "`explain` takes names of the source or of the output, and globs.",
    ),
    "many-tensors": error(
        '"{name}" means {count} different decisions: {examples}',
        "`explain` explains one decision; narrow the pattern.",
    ),
}
