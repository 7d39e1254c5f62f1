"""Calls a network in a runtime under emulation, where there is no PyTorch.

    call.py RUNTIME PATH IMAGE OUT CALLS

Before each call and at the end stands a call of getppid, at which `plugin.c` writes how many instructions
there were. The result of the last call goes to OUT.
"""

import os
import sys
from collections.abc import Callable

import numpy as np


def onnxruntime(path: str, image: np.ndarray) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image}
    return lambda: session.run(None, feed)[0]


def litert(path: str, image: np.ndarray) -> Callable[[], np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def call() -> np.ndarray:
        interpreter.set_tensor(taken, image)
        interpreter.invoke()
        return interpreter.get_tensor(given)

    return call


def ncnn(path: str, image: np.ndarray) -> Callable[[], np.ndarray]:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_fp16_arithmetic, net.opt.use_fp16_storage = 1, False, False
    net.opt.use_fp16_packed = net.opt.use_bf16_storage = False
    if net.load_param(f"{path}.ncnn.param") or net.load_model(f"{path}.ncnn.bin"):
        raise RuntimeError("ncnn cannot load the network")
    mat = ncnn.Mat(image[0]).clone()  # which does not depend on the image's memory

    def call() -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", mat)
        status, out = extractor.extract("out0")
        if status:
            raise RuntimeError(f"ncnn returned {status}")
        return np.array(out)[None]

    return call


def main() -> None:
    runtime, path, image, out, calls = sys.argv[1:]
    call = {"onnxruntime": onnxruntime, "litert": litert, "ncnn": ncnn}[runtime](path, np.load(image))
    for _ in range(int(calls)):
        os.getppid()
        result = call()
    os.getppid()
    np.save(out, result)


main()
