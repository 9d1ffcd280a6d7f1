"""The launchers: they parse, pass on arguments and signals, and requeue; the manifest fits its API.

No cluster is here: `srun`, `scontrol`, `gcloud` and `python` are stand-ins that note what they
are asked.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes a stand-in: a shell script that is found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(name: str, body: str) -> None:
        (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$NOTES"\n{body}\n')
        (folder / name).chmod(0o755)

    return make


@pytest.fixture
def notes(tmp_path):
    return lambda: (tmp_path / "notes").read_text().splitlines()


def launch(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert result.stdout == ""
    assert "--config" in script.read_text().split("\nset -")[0]  # how to use it, on top


# --------------------------------------------------------------------------------------- Slurm

SRUN = "srun --kill-on-bad-exit=0 --wait=100 python -m mocosfl_jax.main"


@pytest.mark.parametrize(("nodes", "multihost"), [("1", ""), ("3", " --multihost")])
def test_slurm_starts_a_process_a_node(programs, notes, monkeypatch, nodes, multihost):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", nodes)
    programs("srun", "exit 0")
    assert launch("slurm.sh", "c.py", "runs/a b", "--config.cut=2").returncode == 0
    assert notes() == [f"{SRUN} --config c.py --workdir runs/a b{multihost} --config.cut=2"]


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (1, False), (2, False)])
def test_slurm_requeues_what_was_stopped(programs, notes, monkeypatch, status, requeued):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    programs("srun", f"exit {status}")
    programs("scontrol", "")
    assert launch("slurm.sh", "c.py", "w").returncode == status
    assert ("scontrol requeue 77" in notes()) == requeued


def test_slurm_says_how_it_is_used():
    result = launch("slurm.sh", "c.py")
    assert result.returncode != 0
    assert "CONFIG WORKDIR" in result.stderr


# --------------------------------------------------------------------------------------- local

ID = 'id=${*: -1}\necho "$id gpus=$CUDA_VISIBLE_DEVICES" >>"$NOTES"\n'


def test_local_starts_all_processes_on_one_coordinator(programs, notes, monkeypatch):
    monkeypatch.setenv("PORT", "12345")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    programs("python", ID)
    assert launch("local.sh", "2", "--config", "c.py", "--workdir", "w").returncode == 0
    common = "python -m mocosfl_jax.main --config c.py --workdir w --coordinator 127.0.0.1:12345"
    assert sorted(notes()) == sorted(
        [f"{common} --num_processes 2 --process_id {process}" for process in (0, 1)]
        + ["0 gpus=4,7", "1 gpus=5"]
    )


@pytest.mark.parametrize(
    ("statuses", "worst"), [("0 0 0", 0), ("0 143 0", 143), ("143 3 0", 3), ("0 0 2", 2)]
)
def test_local_ends_with_the_worst_status(programs, statuses, worst):
    exits = f"statuses=({statuses})\nexit ${{statuses[id]}}"
    programs("python", f"id=${{*: -1}}\ntrap 'sleep 1; {exits}' TERM\nsleep 0.5\n{exits}")
    assert launch("local.sh", "3", "--config", "c.py").returncode == worst


def test_local_stops_the_others_when_one_fails(programs, notes):
    waits = "trap 'echo stopped >>\"$NOTES\"; exit 143' TERM\nwhile :; do sleep 0.1; done"
    programs("python", f"id=${{*: -1}}\nif ((id)); then sleep 1; exit 5; fi\n{waits}")
    assert launch("local.sh", "2", "--config", "c.py").returncode == 5
    assert "stopped" in notes()


def heed_signals() -> None:
    """Where the tests themselves run in the background, SIGINT is ignored, and bash inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_and_waits(programs, notes, tmp_path, number):
    # Process 0 is fast; a second signal while another one saves would end it with status 9.
    saves = 'trap \'trap "exit 9" TERM; sleep $((id > 0)); echo saved >>"$NOTES"; exit 143\' TERM'
    programs(
        "python", f'id=${{*: -1}}\n{saves}\necho ready >>"$NOTES"\nwhile :; do sleep 0.1; done'
    )
    command = [LAUNCH / "local.sh", "3", "--config", "c.py"]
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=heed_signals)
    while not (tmp_path / "notes").exists() or notes().count("ready") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 143
    assert notes().count("saved") == 3


@pytest.mark.parametrize("processes", ["0", "two", "-1"])
def test_local_refuses_what_is_no_number(processes):
    result = launch("local.sh", processes, "--config", "c.py")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert processes in result.stderr


# ----------------------------------------------------------------------------------------- TPU


def test_tpu_vm_copies_installs_and_runs_on_all_hosts(programs, notes, monkeypatch):
    monkeypatch.setenv("TPU", "slice")
    monkeypatch.setenv("ZONE", "zone-b")
    programs("gcloud", "")
    programs("git", "")
    arguments = ("--config", "c.py", "--workdir", "/mnt/a b")
    assert launch("tpu_vm.sh", *arguments).returncode == 0
    git, copy, *install, run = notes()
    assert git.startswith("git archive --format=tar.gz")
    assert copy.startswith("gcloud compute tpus tpu-vm scp ")
    assert copy.endswith(" slice:mocosfl_jax.tar.gz --zone=zone-b --worker=all")
    ssh = "gcloud compute tpus tpu-vm ssh slice --zone=zone-b --worker=all --command="
    assert install[0].startswith(ssh)
    assert '".[tpu]"' in install[-1]
    assert run.startswith(ssh)
    assert run.endswith(r"mocosfl_jax.main --multihost --config c.py --workdir /mnt/a\ b")


@pytest.mark.parametrize("missing", ["TPU", "ZONE"])
def test_tpu_vm_asks_for_what_is_missing(programs, monkeypatch, missing):
    for name in {"TPU", "ZONE"} - {missing}:
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv(missing, raising=False)
    result = launch("tpu_vm.sh", "--config", "c.py")
    assert result.returncode != 0
    assert missing in result.stderr


# ---------------------------------------------------------------------------------- Kubernetes

TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 0}


def fields(required: dict, **optional) -> dict:
    """Schema of an object that has no fields but these."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def several(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


# The fields of the APIs that the manifest uses, as their references define them.
METADATA = fields({"name": NAME})
CONTAINER = fields(
    {"name": NAME, "image": TEXT, "args": several(TEXT)},
    resources=fields({"limits": {"type": "object"}}),
    volumeMounts=several(fields({"name": NAME, "mountPath": {"pattern": "^/"}})),
)
VOLUME = {
    "oneOf": [
        fields({"name": NAME, "persistentVolumeClaim": fields({"claimName": TEXT})}),
        fields({"name": NAME, "emptyDir": fields({"medium": {"enum": ["", "Memory"]}})}),
    ]
}
POD = fields(
    {"containers": several(CONTAINER), "restartPolicy": {"enum": ["Never", "OnFailure"]}},
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=COUNT,
    volumes=several(VOLUME),
)
EXIT_CODES = fields(
    {"operator": {"enum": ["In", "NotIn"]}, "values": several(COUNT)}, containerName=NAME
)
POD_FAILURE_RULE = fields(
    {"action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}, "onExitCodes": EXIT_CODES}
)
JOB = fields(
    {"template": fields({"spec": POD})},
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=fields({"rules": several(POD_FAILURE_RULE)}),
)
FAILURE_RULE = fields(
    {
        "action": {
            "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"],
        }
    },
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9_-])?$"},
    onJobFailureReasons=several(
        {
            "enum": [
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            ]
        }
    ),
)
JOBSET = fields(
    {
        "replicatedJobs": several(
            fields({"name": NAME, "template": fields({"spec": JOB})}, replicas=COUNT)
        )
    },
    failurePolicy=fields({}, maxRestarts=COUNT, rules=several(FAILURE_RULE)),
)
RBAC = "rbac.authorization.k8s.io"
RULE = fields({"apiGroups": {"type": "array"}, "resources": several(TEXT), "verbs": several(TEXT)})
SCHEMAS = {
    ("v1", "ServiceAccount"): {},
    (f"{RBAC}/v1", "Role"): {"rules": several(RULE)},
    (f"{RBAC}/v1", "RoleBinding"): {
        "subjects": several(fields({"kind": {"const": "ServiceAccount"}, "name": NAME})),
        "roleRef": fields({"apiGroup": {"const": RBAC}, "kind": {"const": "Role"}, "name": NAME}),
    },
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): {"spec": JOBSET},
}


@pytest.fixture(scope="module")
def manifest():
    documents = list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def test_the_manifest_fits_its_schema(manifest):
    assert {(d["apiVersion"], d["kind"]) for d in manifest.values()} == SCHEMAS.keys()
    for document in manifest.values():
        own = SCHEMAS[document["apiVersion"], document["kind"]]
        schema = fields({"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, **own})
        jsonschema.validate(document, schema)


def test_the_schema_sees_a_misspelt_field(manifest):
    job = manifest["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    with pytest.raises(jsonschema.ValidationError, match="completion"):
        jsonschema.validate({**job, "completion": 2}, JOB)


def test_the_parts_of_the_manifest_agree(manifest):
    account = manifest["ServiceAccount"]["metadata"]["name"]
    binding = manifest["RoleBinding"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert binding["roleRef"]["name"] == manifest["Role"]["metadata"]["name"]
    job = manifest["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] > 1
    assert job["completionMode"] == "Indexed"  # a process knows its number
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == account
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["args"][0] == "--multihost"
    assert (LAUNCH.parent / container["args"][1].removeprefix("--config=")).exists()


def test_the_image_holds_what_the_run_needs():
    lines = (LAUNCH / "Containerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((LAUNCH.parent / source).exists() for source in line.split()[1:-1]), line
    assert 'ENTRYPOINT ["python", "-m", "mocosfl_jax.main"]' in lines
