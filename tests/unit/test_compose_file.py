"""The compose file: every command, variable, port and file that it names is there, and it is careful."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click import Context
from typer.main import get_command

from broker_schemas.errors import DataError
from configs import load_config
from rollstream.commands.preparing import PASSWORDS, default_passwords, prepare_inputs
from rollstream.commands.program import app
from rollstream.models.shipped import SHIPPED_MODEL
from rollstream.vllm.plan import ServeOptions, plan_servers
from rollstream.wiring.access import PORT_OFFSETS
from tests.source_tree import ROOT

COMPOSE: Final = ROOT / "docker-compose.yml"
TEXT: Final = COMPOSE.read_text(encoding="utf-8")
CONTENT: Final[dict[str, Any]] = yaml.safe_load(TEXT)
SERVICES: Final[dict[str, dict[str, Any]]] = CONTENT["services"]
ROLES: Final = {
    "dispatcher": "dispatch",
    "producer": "produce",
    "matcher": "match",
    "packer": "pack",
    "evaluator": "gather",
    "learner": "learn",
    "archive": "archive",
    "exporter": "export",
}
CONFIG: Final = "configs/compose.yaml"


def with_defaults(text: str) -> str:
    """Fill in the default of every variable, as compose does with an empty environment."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


@pytest.mark.req("O-1")
def test_every_service_of_the_stack_is_there() -> None:
    wanted = {"redis", "init", *ROLES, "prometheus", "alertmanager", "grafana"}
    assert set(SERVICES) == {*wanted, "vllm"}
    assert SERVICES["vllm"]["profiles"] == ["vllm"]
    assert not any("profiles" in SERVICES[name] for name in wanted)


@pytest.mark.req("O-1")
@pytest.mark.parametrize("name", ["init", *ROLES])
def test_a_role_runs_a_command_that_exists_on_a_configuration_that_loads(name: str) -> None:
    command, path = SERVICES[name]["command"]
    assert command == {**ROLES, "init": "prepare"}[name]
    # the program takes it, arguments and all
    program = get_command(app)
    found = program.get_command(Context(program), command)  # type: ignore[attr-defined]
    assert found is not None
    found.make_context(command, [with_defaults(path)])
    assert load_config(ROOT / with_defaults(path)).run.name == "compose"


@pytest.mark.req("O-1", "O-3")
@pytest.mark.parametrize("name", sorted(ROLES))
def test_a_roles_health_is_its_own_endpoint_and_prometheus_finds_it(name: str) -> None:
    # given
    config = load_config(ROOT / CONFIG)
    port = config.metrics.base_port + PORT_OFFSETS[ROLES[name]]
    scrapes = yaml.safe_load((ROOT / "grafana/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = (job for job in scrapes["scrape_configs"] if job["job_name"] == name)
    # then
    assert f"http://127.0.0.1:{port}/readyz" in SERVICES[name]["healthcheck"]["test"][-1]
    if name == "learner":  # any number of ranks: the first of them names all
        assert [found["url"] for found in job["http_sd_configs"]] == [f"http://learner:{port}/targets"]
    else:
        assert [(found["names"], found["port"]) for found in job["dns_sd_configs"]] == [([name], port)]
    assert job["honor_labels"], "else Prometheus renames the run and role that a process says of itself"
    assert "relabel_configs" not in job, "a run of any name is scraped"
    assert config.metrics.host == "0.0.0.0", "else nobody outside the container reaches it"


@pytest.mark.req("O-1")
def test_the_broker_of_the_configuration_is_the_service_with_its_password_and_room() -> None:
    config, command = load_config(ROOT / CONFIG), SERVICES["redis"]["command"]
    assert config.broker.url == "redis://redis:6379/0"
    assert config.broker.password_env in SERVICES["matcher"]["environment"]
    assert SERVICES["redis"]["environment"]["REDISCLI_AUTH"] == command[command.index("--requirepass") + 1]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--appendfsync") + 1] == config.broker.durability
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert 2 * config.broker.max_bytes <= server_memory(1500 << 20)


def server_memory(container_bytes: int) -> int:
    """Return what the service's own shell gives the server, in a container of so much memory."""
    script = SERVICES["redis"]["command"][2].replace("$$", "$")
    script = script.replace("cat /sys/fs/cgroup/memory.max", f"echo {container_bytes}")
    script = script.replace("exec redis-server", "echo")
    done = subprocess.run(["sh", "-c", script, "redis", "--more"], capture_output=True, text=True, check=True)
    name, given, more = done.stdout.split()
    assert (name, more) == ("--maxmemory", "--more")
    return int(given)


@pytest.mark.req("O-1")
def test_one_variable_gives_the_server_and_its_container_their_memory() -> None:
    assert with_defaults(SERVICES["redis"]["mem_limit"]) == "1500m"
    assert "REDIS_MEMORY" in SERVICES["redis"]["mem_limit"]
    assert server_memory(6 << 30) == 4 << 30


@pytest.mark.req("O-1")
@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"init"}))
def test_a_service_is_careful(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"]
    assert service["restart"] in ("on-failure", "unless-stopped")
    assert service["mem_limit"]
    if name not in ROLES:  # the roles' image has its user in the Dockerfile
        assert service["user"] not in ("root", "0")


@pytest.mark.req("O-1")
def test_things_start_in_order_and_stop_in_peace() -> None:
    for name in ROLES:
        waits = {other: how["condition"] for other, how in SERVICES[name]["depends_on"].items()}
        assert waits == {"redis": "service_healthy", "init": "service_completed_successfully"}
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= 30
        assert SERVICES[name]["init"] is True
        assert "container_name" not in SERVICES[name], "replicas need names of their own"
        assert "ports" not in SERVICES[name], "replicas cannot share a port of the machine"
    assert SERVICES["init"]["restart"] == "no"


@pytest.mark.req("O-1")
def test_only_the_pages_are_published_and_only_to_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert {name: with_defaults(ports[0]) for name, ports in published.items()} == {
        "grafana": "127.0.0.1:3000:3000",
        "prometheus": "127.0.0.1:9090:9090",
        "alertmanager": "127.0.0.1:9093:9093",
    }


@pytest.mark.req("O-1")
def test_every_variable_has_a_default_and_is_explained() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)[^}]*\}", TEXT))
    assert used == set(re.findall(r"(?<!\$)\$\{(\w+)(?::-[^}]+|-)\}", TEXT)), "without a default"
    explained = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", TEXT.partition("\nx-role")[0]))
    assert used <= explained


@pytest.mark.req("O-1")
def test_every_file_and_volume_that_is_mounted_exists() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", ()):
            source = with_defaults(mount).split(":")[0]
            if source.startswith("."):
                path = ROOT / source
                assert path.is_file() or any(path.iterdir()), f"{name}: {source}"
            else:
                assert source in CONTENT["volumes"], f"{name}: {source}"


@pytest.mark.req("O-1")
def test_the_paths_of_the_configuration_lie_in_volumes_of_the_image() -> None:
    # given
    config = load_config(ROOT / CONFIG)
    mounts = [with_defaults(mount) for mount in SERVICES["matcher"]["volumes"]]
    mounted = {mount.split(":")[1].rpartition("/")[2] for mount in mounts}
    # then
    for path in (config.data.train_jsonl, config.model.name_or_path, config.run.output_dir):
        assert path is not None
        assert Path(path).parts[0] in mounted
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert all(f"/srv/rollstream/{name}" in dockerfile for name in mounted - {"configs"})
    assert "WORKDIR /srv/rollstream" in dockerfile


@pytest.mark.req("V-1")
def test_the_vllm_service_is_started_as_the_program_would_start_it() -> None:
    # given
    config = load_config(ROOT / "configs/stage2_async/vllm_compose.yaml")
    options = ServeOptions(host="0.0.0.0", gpus=(0,))
    (plan,) = plan_servers(config, SHIPPED_MODEL, options)
    # when
    said = SERVICES["vllm"]["command"]
    flags = [part for flag in said[1:] for part in flag.split("=", 1)]
    # then
    assert flags == list(plan.flags[1:]), "write the flags of rollstream/vllm/plan.py into the compose file"
    assert said[0] == config.model.name_or_path
    environment, mounts = SERVICES["vllm"]["environment"], SERVICES["vllm"]["volumes"]
    assert environment.keys() - plan.environment.keys() == {"HOME"}
    assert all(environment[name] == value for name, value in plan.environment.items() if name != "PYTHONPATH")
    worker = Path(plan.environment["PYTHONPATH"]).relative_to(ROOT)
    assert f"./{worker}:{environment['PYTHONPATH']}:ro" in mounts
    assert plan.base_url == "http://vllm:8000"


@pytest.mark.req("O-1")
def test_grafana_reads_what_is_mounted_into_it() -> None:
    mounts = {mount.split(":")[0]: mount.split(":")[1] for mount in SERVICES["grafana"]["volumes"]}
    providers = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/rollstream.yml").read_text("utf-8"))
    assert mounts["./grafana/dashboards"] == providers["providers"][0]["options"]["path"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "grafana/dashboards" / Path(home).name).exists()
    sources = yaml.safe_load((ROOT / "grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"


@pytest.mark.req("O-1")
def test_every_folder_of_a_user_is_mounted_by_a_variable_of_its_own() -> None:
    """No rebuild for a configuration, data or a model of one's own."""
    mounts = {mount.rpartition(":/srv/rollstream/")[2]: mount for mount in SERVICES["matcher"]["volumes"]}
    wanted = {
        "configs:ro": "CONFIGS_DIR",
        "data": "DATA_DIR",
        "models": "MODELS_DIR",
        "runs": "RUNS_DIR",
        "hub": "HUB_CACHE",
    }
    assert {place: mount[2:].partition(":")[0] for place, mount in mounts.items()} == wanted
    assert SERVICES["matcher"]["environment"]["HF_HOME"] == "/srv/rollstream/hub"
    for name in ("init", *ROLES):
        assert SERVICES[name]["volumes"] == SERVICES["matcher"]["volumes"]
        assert with_defaults(SERVICES[name]["user"]) == "10001:10001", "who owns the volumes"


@pytest.mark.req("O-1")
def test_init_makes_what_the_demo_lacks_and_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / CONFIG)
    for path in (config.data.train_jsonl, config.data.val_jsonl):
        assert path is not None
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("mine\n", encoding="utf-8")
    first = list(prepare_inputs(config))
    assert (tmp_path / config.data.train_jsonl).read_text(encoding="utf-8") == "mine\n"
    assert [line.partition(":")[0] for line in first] == ["data", "data", "model"]
    assert (tmp_path / "models/scenes_tiny/config.json").exists()
    assert (tmp_path / "models/scenes_tiny/model.safetensors").stat().st_size > 0
    assert all(line.endswith("is there") for line in prepare_inputs(config))


@pytest.mark.req("O-1")
@pytest.mark.parametrize(
    "override, said",
    [
        ("data.train_jsonl=data/mine/train.jsonl", "DATA_DIR=./data"),
        ("data.val_jsonl=data/mine/val.jsonl", "DATA_DIR=./data"),
        ("model.name_or_path=Qwen/Qwen3-VL-4B-Instruct", "HUB_CACHE"),
        ("model.name_or_path=models/mine", "MODELS_DIR=./models"),
    ],
)
def test_init_invents_nothing_for_inputs_of_ones_own(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=said):
        list(prepare_inputs(load_config(ROOT / CONFIG, (override,))))
    assert not list(tmp_path.iterdir()), "nothing was drawn or copied"


def test_init_says_at_once_that_nobody_may_write_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # the tests may be root's, who may write anywhere unless the container took that right away
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match=r"run\.output_dir: user \d+ may not write into .*runs.*RUN_USER"):
        list(prepare_inputs(load_config(ROOT / CONFIG)))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_init_says_at_once_that_the_model_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / CONFIG)
    list(prepare_inputs(config))
    override = f"model.name_or_path={tmp_path / 'models/scenes_tiny'}"
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "model.safetensors")
    with pytest.raises(DataError, match=r"user \d+ may not read .*model\.safetensors.*RUN_USER"):
        list(prepare_inputs(load_config(ROOT / CONFIG, (override,))))


def test_passwords_that_everybody_can_read_are_told_at_the_start() -> None:
    told = {"REDIS_PASSWORD": "rollstream", "GRAFANA_PASSWORD": "of my own"}
    assert default_passwords(told) == ["REDIS_PASSWORD"]
    given = SERVICES["init"]["environment"]
    assert {name: with_defaults(given[name]) for name in PASSWORDS} == dict.fromkeys(PASSWORDS, "rollstream")
