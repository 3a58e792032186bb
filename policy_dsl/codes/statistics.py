"""The codes of defects in files of statistics, which methods that look at inputs need."""

from __future__ import annotations

from policy_dsl.codes.kinds import Code, error, warning

STATISTICS_CODES: dict[str, Code] = {
    "unused-statistics": warning(
        "no treatment of this plan needs {name}: {path} is not read",
        "Only methods that look at inputs, such as `awq`, need statistics of them; saliencies "
        "only `prune experts to N by NAME`.",
    ),
    # what ranks experts
    "not-saliencies": error(
        "{path} holds no saliencies of experts: {reason}",
        "They are tensors [layers, experts] in safetensors, or lists in JSON.",
    ),
    "missing-saliency": error(
        '{path} has no entry "{name}"; it has {known}',
        "`prune experts to N by NAME` takes the entry NAME of the saliency file.",
    ),
    "bad-saliency": error(
        'saliencies {path}, entry "{name}": {reason}',
        "An entry has a number for every expert of each layer; `keep` lists those that stay.",
    ),
    # importance matrices
    "not-an-imatrix": error(
        "{path} is not a whole importance matrix: {reason}",
        "llama-imatrix writes them, as GGUF or in the older form `.dat`.",
    ),
    "bad-imatrix-entry": error(
        'importance matrix {path}, entry "{entry}": {reason}',
        "Sums of squares and counts of tokens are numbers from 0 up, and some token came.",
        each="entry",
    ),
    "imatrix-of-another-model": error(
        'importance matrix {path}, entry "{entry}": {found}, the model has {wanted}',
        "An entry has a sum for each column of each expert, so the file is another model's.",
        each="entry",
    ),
    "missing-imatrix-entry": error(
        "importance matrix {path} has nothing about {what}",
        "The file was made of another model, or its text never reached this matrix.",
    ),
    "imatrix-without-counts": warning(
        "importance matrix {path} does not say how many tokens each expert got",
        "Experts that are added up weigh alike then, however often they were chosen.",
    ),
}
