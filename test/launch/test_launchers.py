"""The launchers: arguments, files and printed lines to the byte, failures, signals.

Most tests run them in a folder of their own (with a space in its name) over a stand-in for Python
that records how it was called and prints a given log; the last ones run the real programs.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import time

import pytest

from helpers.launcher_place import EVAL_LOG, FIRST_LINE, TRAIN_LOG, Workplace, run_command


@pytest.fixture
def place(tmp_path):
    return Workplace(tmp_path)


def seconds_removed(text):
    return re.sub(r"(?m)^(E2E.* [:=] )\d+$", r"\1N", text)


def test_full_training_prints_and_writes_the_result(place):
    done = place.run("train_full_1p.sh", place.data)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("device id is 0\n")
    result = done.stdout[done.stdout.index("------------------ Final"):]
    assert seconds_removed(result) == (
        "------------------ Final result ------------------\n"
        "Final Performance images/sec : 25.400\n"
        "Final Train Accuracy : box mAP: 31.98 , mask mAP: 29.62 \n"
        "E2E Training Duration sec : N\n")
    assert seconds_removed(place.output("YOLACT_bs8_1p_acc.log")) == (
        "Network = YOLACT\n"
        "RankSize = 1\n"
        "BatchSize = 8\n"
        f"DeviceType = {platform.machine()}\n"
        "CaseName = YOLACT_bs8_1p_acc\n"
        "ActualFPS = 25.400\n"
        "TrainingTime = 314.96\n"
        "TrainAccuracy = box mAP: 31.98 , mask mAP: 29.62 \n"
        "ActualLoss = 18.125\n"
        "E2ETrainingTime = N\n")
    assert place.output("train_YOLACT_bs8_1p_acc_loss.txt") == "22.000\n20.000\n18.125\n"
    log = place.output("train_0.log")
    assert TRAIN_LOG in log and EVAL_LOG in log and "something on stderr" in log
    assert EVAL_LOG in place.output("eval_0.log")
    assert TRAIN_LOG in done.stdout and EVAL_LOG in done.stdout


def test_full_training_passes_its_defaults_then_the_caller_s_flags(place):
    done = place.run("train_full_1p.sh", place.data, "--batch_size=4", "--config=a b;$(id)",
                     "--lr", "-1e-3", "--resume", "x y.pth", "--node_device=cpu",
                     "--fps_start_iter=3", "--no_log", "--keep_latest=True")
    assert done.returncode == 0, done.stderr
    cores = min(8, len(os.sched_getaffinity(0)))
    assert place.arguments_of("train.py") == [
        f"--data={place.data}", "--seed=1234", f"--num_workers={cores}",
        "--batch_size=4", "--node_device=cpu", "--validation_epoch=-1", "--batch_size=4",
        "--config=a b;$(id)", "--lr", "-1e-3", "--resume", "x y.pth", "--fps_start_iter=3",
        "--no_log", "--keep_latest=True"]
    assert place.arguments_of("eval.py") == [
        "--trained_model=weights/my run/yolact_base_1_20.pth", f"--val_data={place.data}",
        "--eval_device=cpu", "--run_folder=auto"]
    assert "TrainingTime = 157.48\n" in place.output("YOLACT_bs4_1p_acc.log")


@pytest.mark.parametrize("arguments", [
    ["{}"], ["--data_path={}"], ["--data_path", "{}"], ["--data={}"], ["--batch_size=2", "{}"],
    ["--batch_size", "2", "--data_path={}"]])
def test_all_ways_to_give_the_data_path(place, arguments):
    done = place.run("train_performance_1p.sh",
                     *[argument.format(place.data) for argument in arguments])
    assert done.returncode == 0, done.stdout
    assert place.arguments_of("train.py")[0] == f"--data={place.data}"


@pytest.mark.parametrize("folder, script", [
    (".", "test/train_performance_1p.sh"), ("test", "train_performance_1p.sh"),
    ("test", "./train_performance_1p.sh"), ("..", "my project/test/train_performance_1p.sh")])
def test_runs_from_any_folder_with_a_path_relative_to_it(place, folder, script):
    start = place.root / folder
    relative = os.path.relpath(str(place.data), str(start))
    done = run_command(["bash", script, relative], start, place.env)
    assert done.returncode == 0, done.stderr
    given = place.arguments_of("train.py")[0][len("--data="):]
    assert os.path.isabs(given) and os.path.realpath(given) == str(place.data)
    assert "CaseName" in place.output("YOLACT_bs8_1p_perf.log")


@pytest.mark.parametrize("script", ["train_full_1p.sh", "train_performance_1p.sh",
                                    "train_eval_1p.sh"])
def test_missing_data_path_has_modelzoo_s_words(place, script):
    done = place.run(script, "--batch_size=4")
    assert done.returncode == 1
    assert done.stdout == '[Error] para "data_path" must be confing\n'
    assert not (place.root / "test" / "output").exists()


@pytest.mark.parametrize("script", ["train_full_1p.sh", "train_performance_1p.sh",
                                    "train_eval_1p.sh"])
def test_help_shows_how_to_call_it(place, script):
    done = place.run(script, "--help")
    assert done.returncode == 0
    assert "bash test/" + script in done.stdout


def test_performance_trains_2000_steps_and_does_not_evaluate(place):
    done = place.run("train_performance_1p.sh", place.data, "--max_iter=300")
    assert done.returncode == 0, done.stderr
    arguments = place.arguments_of("train.py")
    assert arguments.index("--max_iter=2000") < arguments.index("--max_iter=300")
    assert not (place.stub / "eval.py.args").exists()
    assert "Accuracy" not in done.stdout
    keys = [line.split(" = ")[0] for line in place.output("YOLACT_bs8_1p_perf.log").splitlines()]
    assert keys == ["Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS",
                    "TrainingTime", "ActualLoss", "E2ETrainingTime"]


def test_a_batch_size_that_training_chose_is_reported(place):
    place.write("train.py.log", "Batch size auto : 22 per card, by what fits\n" + TRAIN_LOG)
    done = place.run("train_performance_1p.sh", place.data, "--batch_size=auto")
    assert done.returncode == 0, done.stderr
    assert "--batch_size=auto" in place.arguments_of("train.py")
    found = place.output("YOLACT_bsauto_1p_perf.log")
    assert "BatchSize = 22\n" in found and "TrainingTime = 866.14\n" in found


def test_evaluation_only(place):
    log = place.root / "test" / "output" / "0" / "train_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier training")
    done = place.run("train_eval_1p.sh", place.data, "--pth_path=weights/x y.pth",
                     "--max_images=10")
    assert done.returncode == 0, done.stderr
    assert place.arguments_of("eval.py") == [
        "--trained_model=weights/x y.pth", f"--val_data={place.data}",
        "--eval_device=auto", "--max_images=10"]
    assert log.read_text() == "of an earlier training"
    assert "Final Train Accuracy : box mAP: 31.98 , mask mAP: 29.62 \n" in done.stdout
    assert "TrainAccuracy = box mAP: 31.98 , mask mAP: 29.62 \n" in place.output(
        "YOLACT_bs8_1p_eval.log")
    assert "images/sec" not in done.stdout


def test_evaluation_needs_weights(place):
    done = place.run("train_eval_1p.sh", place.data)
    assert done.returncode == 1
    assert done.stdout == '[Error] para "pth_path" must be confing\n'


def test_device_of_the_environment_wins(place):
    done = place.run("train_performance_1p.sh", place.data, "--device_id=2", ASCEND_DEVICE_ID="5")
    assert done.stdout.startswith("device id is 5\n")
    assert "ActualFPS" in place.output("YOLACT_bs8_1p_perf.log", device=5)
    found = place.environment_of("train.py")
    assert found["ASCEND_DEVICE_ID"] == "5"
    assert (found["RANK_ID"], found["RANK_SIZE"]) == ("0", "1")
    assert "WORLD_SIZE" not in found and "RANK" not in found


def test_device_of_the_flag(place):
    place.run("train_performance_1p.sh", place.data, "--device_id=2")
    assert place.environment_of("train.py")["ASCEND_DEVICE_ID"] == "2"
    assert "ActualFPS" in place.output("YOLACT_bs8_1p_perf.log", device=2)


@pytest.mark.parametrize("value, kind, number", [
    ("2", "card", "2"), ("npu:2", "npu", "2"), ("cuda:0", "cuda", "0"), ("cpu", "cpu", "0")])
def test_device_as_other_tools_name_it(place, value, kind, number):
    done = place.run("train_performance_1p.sh", place.data, "--device", value, "--batch=4")
    assert done.returncode == 0, done.stderr
    assert place.environment_of("train.py")["ASCEND_DEVICE_ID"] == number
    arguments = place.arguments_of("train.py")
    assert f"--node_device={kind}" in arguments and "--device" not in arguments
    assert "BatchSize = 4\n" in place.output("YOLACT_bs4_1p_perf.log", device=number)


@pytest.mark.parametrize("device", ["..", "../..", "npu", "0/.."])
def test_a_device_that_is_no_number_deletes_nothing(place, device):
    done = place.run("train_performance_1p.sh", place.data, "--device_id=" + device)
    assert done.returncode == 1
    assert "expected a whole number" in done.stdout
    assert (place.root / "test" / "common.sh").exists()


def test_the_output_folder_is_made_anew(place):
    stale = place.root / "test" / "output" / "0" / "train_YOLACT_bs8_1p_perf_loss.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("1.000\n")
    place.run("train_performance_1p.sh", place.data)
    assert stale.read_text() == "22.000\n20.000\n18.125\n"


@pytest.mark.parametrize("status", [1, 2])
def test_failed_training_fails_the_launcher_with_the_end_of_its_log(place, status):
    place.write("train.py.log", "first line\n" + "more\n" * 30 + "error: no such folder\n")
    place.write("train.py.exit", str(status))
    done = place.run("train_full_1p.sh", place.data)
    assert done.returncode == status
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"[Error] train.py ended with exit code {status};")
    assert lines[-2:] == ["error: no such folder", "something on stderr"]
    assert len(lines) == 21
    assert "Final" not in done.stdout
    assert not (place.stub / "eval.py.args").exists()


def test_failed_evaluation_fails_the_launcher_and_says_how_to_go_on(place):
    place.write("eval.py.exit", "2")
    done = place.run("train_full_1p.sh", place.data)
    assert done.returncode == 2
    assert "bash test/train_eval_1p.sh" in done.stderr
    assert "[Error] eval.py ended with exit code 2" in done.stderr


def test_training_that_names_no_weights_is_a_failure(place):
    place.write("train.py.log", TRAIN_LOG.replace("Final weights", "Other"))
    done = place.run("train_full_1p.sh", place.data)
    assert done.returncode == 1
    assert "names no final weights" in done.stderr


@pytest.mark.parametrize("log", ["", FIRST_LINE])
def test_no_measured_step_is_said_and_divides_nothing(place, log):
    place.write("train.py.log", log)
    done = place.run("train_performance_1p.sh", place.data)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "No speed was measured" in done.stdout
    assert "Final Performance images/sec : 0.000\n" in done.stdout
    assert "ActualFPS = 0.000\nTrainingTime = 0.00\n" in place.output("YOLACT_bs8_1p_perf.log")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_program_and_end_the_launcher(place, number, status):
    place.write("train.py.endless", "")
    launcher = subprocess.Popen(place.command("train_full_1p.sh", place.data), cwd=str(place.root),
                                env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                universal_newlines=True)
    try:
        deadline = time.time() + 30
        while not (place.stub / "started").exists():
            assert time.time() < deadline and launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=30)
    finally:
        launcher.kill()
    assert launcher.returncode == status
    assert "stopped by " + number.name[3:] in place.output("train_0.log")
    assert "interrupted" in err
    assert "Final" not in out.replace("Final weights", "")
    assert not (place.stub / "eval.py.args").exists()


def make_cann(folder, name="ascend-toolkit"):
    script = folder / "cann place" / name / "set_env.sh"
    script.parent.mkdir(parents=True)
    script.write_text("export ASCEND_OPP_PATH=/some/opp\n")
    return str(folder / "cann place")


@pytest.mark.parametrize("name", ["ascend-toolkit", "nnae", "cann"])
def test_cann_is_set_up_where_it_is(place, tmp_path, name):
    place.run("train_performance_1p.sh", place.data, CANN_INSTALL_PATH=make_cann(tmp_path, name))
    found = place.environment_of("train.py")
    assert found["ASCEND_OPP_PATH"] == "/some/opp"
    assert found["ASCEND_GLOBAL_LOG_LEVEL"] == "3"
    assert found["TASK_QUEUE_ENABLE"] == "1"


def test_the_platform_s_own_cann_is_left_alone(place, tmp_path):
    place.run("train_performance_1p.sh", place.data, CANN_INSTALL_PATH=make_cann(tmp_path),
              etp_running_flag="true")
    assert "ASCEND_OPP_PATH" not in place.environment_of("train.py")


def test_without_cann_nothing_is_set_up(place, tmp_path):
    done = place.run("train_performance_1p.sh", place.data, CANN_INSTALL_PATH=str(tmp_path))
    assert done.returncode == 0 and done.stderr == ""
    assert "ASCEND_GLOBAL_LOG_LEVEL" not in place.environment_of("train.py")


@pytest.mark.parametrize("config, network", [
    ("yolact_plus_resnet50_config", "YOLACT-plus"), ("mine/yolact_plus_own.yaml", "YOLACT-plus"),
    ("yolact_base_config", "YOLACT")])
def test_the_case_of_yolact_plus_has_modelzoo_s_name(place, config, network):
    done = place.run("train_performance_1p.sh", place.data, "--config=" + config)
    assert done.returncode == 0, done.stderr
    case = place.output(network + "_bs8_1p_perf.log")
    assert case.startswith(f"Network = {network}\n")
    assert f"\nCaseName = {network}_bs8_1p_perf\n" in case
    assert "--config=" + config in place.arguments_of("train.py")


def test_the_launcher_for_several_hosts_takes_modelzoo_s_flags(place):
    (place.root / "test" / "train_performance_8p.sh").write_text(
        'echo "$NNODES $NODE_RANK $HCCL_IF_IP $MASTER_ADDR $MASTER_PORT"; printf "%s\\n" "$@"\n')
    done = place.run("train_performance_multinodes.sh", "--data_path=/a b", "--nnodes=2",
                     "--node_rank", "1", "--local_addr=10.0.0.2", "--master_addr=10.0.0.1",
                     "--master_port=29700", "--batch_size", "4")
    assert done.stdout.splitlines() == [
        "2 1 10.0.0.2 10.0.0.1 29700", "--data_path=/a b", "--batch_size", "4"]
