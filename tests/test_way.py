"""One expert tensor's way from policy to bytes and back runs through few files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("policyc", "policy_dsl", "emitters")
# A newcomer opens these; imports count, because Python runs a module to import it.
MOST_FILES = 100

FOLLOWED = """
import sys, threading
from pathlib import Path

root = Path(sys.argv[1])
seen = set()

def note(frame, event, argument):
    seen.add(frame.f_code.co_filename)

threading.setprofile(note)
sys.setprofile(note)
from policyc.cli import main

model, out = root / "examples/tiny-minimax-m2", sys.argv[2]
for command in (
    ["build", str(root / "policies/config_i.yaml"), "--model", str(model), "-o", out],
    ["verify", out, "--source", str(model)],
):
    sys.argv = ["policyc", *command]
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    if code:
        sys.exit(f"{command[0]}: exit code {code}")
sys.setprofile(None)
threading.setprofile(None)
print("\\n".join(sorted(seen)), file=sys.stderr)
"""


def test_way_of_a_tensor_opens_few_files(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FOLLOWED, str(ROOT), str(tmp_path / "bundle")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    ours = {
        name
        for name in ran.stderr.splitlines()
        if name.startswith(str(ROOT)) and Path(name).relative_to(ROOT).parts[0] in ROOMS
    }
    if len(ours) > MOST_FILES:
        print(*sorted(Path(n).relative_to(ROOT) for n in ours), sep="\n")
    assert len(ours) <= MOST_FILES, f"{len(ours)} files"
