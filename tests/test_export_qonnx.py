"""A network written as QONNX computes what the packed network computes."""

from __future__ import annotations

import numpy as np
import pytest
from exported import EXACT, NAMES, images, network

from cupybnn.deploy import qonnx_file

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
op_run = pytest.importorskip("onnx.reference.op_run")


class BipolarQuant(op_run.OpRun):
    """As https://github.com/fastmachinelearning/qonnx defines it."""

    op_domain = "qonnx.custom_op.general"

    def _run(self, x, scale):
        return (np.where(x >= 0, scale, -scale).astype(np.float32),)


def check(run, net, exact: bool, count: int) -> None:
    rows = images(count=count).reshape(-1, 20) * np.float32(1 / 16)
    logits = np.concatenate([run({"numbers": row[None]}) for row in rows])
    if exact:
        np.testing.assert_array_equal(logits, net(rows))
    else:
        np.testing.assert_allclose(logits, net(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_network(tmp_path, name):
    net = network(name)
    net.to_qonnx(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    evaluator = reference.ReferenceEvaluator(model, new_ops=[BipolarQuant])
    check(lambda given: evaluator.run(None, given)[0], net, name in EXACT, 100)


@pytest.mark.parametrize("name", NAMES)
def test_the_executor_of_qonnx_agrees(name):
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    executor = pytest.importorskip("qonnx.core.onnx_exec")
    net = network(name)
    model = wrapper.ModelWrapper(qonnx_file.model(net))

    def run(given):
        return executor.execute_onnx(model, given)["logits"]

    check(run, net, name in EXACT, 10)
