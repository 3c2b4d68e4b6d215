"""Deferred work runs in the context of ``step()``, whatever the context in which it is waited for."""

import pytest
from silence import BOTH, EVERY, WARM, check, silence

TAIL = "\n\nopt.zero_grad()\n\nfor step in range(4, 7): train(step)"
STEP = "forward(0).backward(); opt.step()"
FORWARD = "note(model(x(9)))"
CONTEXTS = {
    "inference mode": "with torch.inference_mode(): {}",
    "no grad": "with torch.no_grad(): {}",
    "autocast": "with torch.autocast('cpu', torch.bfloat16): {}",
    "autocast in evaluation": "with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): {}",
    "float64 by default": "torch.set_default_dtype(torch.float64)\ntry: {}\n"
    "finally: torch.set_default_dtype(torch.float32)",
    "bfloat16 by default": "torch.set_default_dtype(torch.bfloat16)\ntry: {}\n"
    "finally: torch.set_default_dtype(torch.float32)",
    "meta device by default": "with torch.device('meta'): note(net(kept))",
    "deterministic": "torch.use_deterministic_algorithms(True)\ntry: {}\n"
    "finally: torch.use_deterministic_algorithms(False)",
    "fake tensors": "from torch._subclasses.fake_tensor import FakeTensorMode\n"
    "with FakeTensorMode(allow_non_fake_inputs=True): note(net(torch.empty(4, 16)).shape)",
    "functional gradient": "note(torch.func.grad(lambda i: net(i).sum())(x(9)))",
    "vmap": "note(torch.vmap(net)(x(9)))",
    "jacobian": "note(torch.func.jacrev(net)(x(9)[0]))",
    "forward gradient": "note(torch.func.jvp(net, (x(9),), (x(8),)))",
    "functionalized": "note(torch.func.functionalize(net)(x(9)))",
    "anomalies detected": "import warnings; warnings.simplefilter('ignore')\nwith torch.autograd.detect_anomaly(): {}",
    "saved tensors on the host": "with torch.autograd.graph.save_on_cpu(): {}",
    "operations counted": "with counting() as seen: {}\nnote(seen)",
    "functions counted": "with counting_functions() as seen: {}\nnote(seen)",
    "flops counted": "from torch.utils.flop_counter import FlopCounterMode\n"
    "with FlopCounterMode(display=False) as counter: {}\nnote(counter.get_total_flops())",
    "another thread": "with ThreadPoolExecutor(1) as pool: pool.submit(lambda: {}).result()",
    "no autograd threads": "with torch.autograd.set_multithreading_enabled(False): {}",
    "graph hooks forbidden": "with torch.autograd.graph.disable_saved_tensors_hooks('none here'): {}",
    "traced": "import warnings; warnings.simplefilter('ignore')\n"
    "note(torch.jit.trace(net, x(9), check_trace=False)(x(9)))",
    "symbolically traced": "import torch.fx; note(torch.fx.symbolic_trace(net)(x(9)))",
    "garbage collected": "import gc; gc.collect(); {}",
    "random numbers": "torch.manual_seed(3)\n{}\nnote(torch.rand(3))",
}
ADAM = {"optimizer": ("AdamW", {"lr": 0.01})}
ADAFACTOR = {"optimizer": ("Adafactor", {"lr": 0.01})}
MAY_REFUSE = {"traced", "fake tensors", "vmap", "meta device by default", "symbolically traced"}


def code(context):
    """An evaluation in a context; one line, or with the forward in a block of its own."""
    return context.replace("{}", FORWARD)


COUNTED = [name for name in CONTEXTS if name.endswith("counted")]  # which see how plain DDP lays its buckets anew
CASES = [
    # The first step, whose optimizer state is made then, and a later one.
    *[
        test
        for name, context in CONTEXTS.items()
        for test in silence(f"context {name}", f"attach()\n\nkept = x(9)\n\n{STEP}"
                            f"{'' if name in COUNTED else chr(10) * 2 + code(context)}"
                            f"\n\nopt.zero_grad()\n\ntrain(1)\n\ntrain(2)\n\nahead(3)\n\n{code(context)}{TAIL}",
                            may_refuse=name in MAY_REFUSE, **ADAM)
    ],
    *[
        test
        for name in ("autocast", "inference mode", "bfloat16 by default", "float64 by default", "deterministic")
        for test in silence(f"Adafactor, {name}", f"{WARM}\n\nahead(3)\n\n{code(CONTEXTS[name])}{TAIL}",
                            ("replicated",), **ADAFACTOR)
    ],
    # What a backend's own collective brings is divided and taken from its buffers by whoever waits.
    *[
        test
        for name, context in CONTEXTS.items() if name not in COUNTED
        for test in silence(f"context {name} by the backend",
                            f"{WARM}\n\nkept = x(9)\n\n{STEP}\n\n{code(context)}{TAIL}",
                            ("sharded", "replicated", "compressed", "owned"), may_refuse=name in MAY_REFUSE,
                            attach={"algorithm": "native"}, **ADAM)
    ],
    *silence("trained under autocast", "attach()\n\nfor step in range(5):\n"
             "    with torch.autocast('cpu', torch.bfloat16): loss = forward(step)\n"
             "    loss.backward(); opt.step(); opt.zero_grad()", EVERY, **ADAM),
    *silence("trained by Adafactor under autocast", "attach()\n\nfor step in range(5):\n"
             "    with torch.autocast('cpu', torch.bfloat16): loss = forward(step)\n"
             "    loss.backward(); opt.step(); opt.zero_grad()", ("replicated", "compressed", "register"), **ADAFACTOR),
    *silence("one autocast for several steps", "attach()\n\nwith torch.autocast('cpu', torch.bfloat16):\n"
             "    for step in range(5): forward(step).backward(); opt.step(); opt.zero_grad()", EVERY, True, **ADAM),
    *silence("a step under autocast", f"{WARM}\n\nforward(3).backward()\n\nwith torch.autocast('cpu', torch.bfloat16): "
             f"opt.step()\n\nforward(8){TAIL}", EVERY, **ADAM),
    *silence("a step under inference mode", f"{WARM}\n\nforward(3).backward()\n\nwith torch.inference_mode(): "
             f"opt.step()\n\nnote(net(x(9))){TAIL}", EVERY, True, **ADAM),
    *silence("float64 by default throughout", "torch.set_default_dtype(torch.float64)\n\n"
             f"{WARM}\n\nnote(net.last.weight.clone())", EVERY, model="Double"),
    *silence("deterministic throughout", "torch.use_deterministic_algorithms(True)\n\nattach()\n\ntry:\n"
             "    for step in range(4): train(step)\nfinally: torch.use_deterministic_algorithms(False)", EVERY,
             **ADAM),
    *silence("evaluation, then training, under inference mode", f"attach()\n\ntrain(0)\n\nwith torch.inference_mode(): "
             f"{FORWARD}\n\ntrain(1)\n\nwith torch.inference_mode(): {FORWARD}{TAIL}", EVERY, **ADAM),
    *silence("attached under inference mode", f"with torch.inference_mode(): attach(){TAIL}", EVERY, True, **ADAM),
    *silence("attached under no_grad", f"with torch.no_grad(): attach(){TAIL}", EVERY, **ADAM),
    *silence("attached under autocast", f"with torch.autocast('cpu', torch.bfloat16): attach(){TAIL}", EVERY, **ADAM),
    *silence("synchronized under inference mode", f"{WARM}\n\nahead(3)\n\nwith torch.inference_mode():\n"
             f"    if run.engine: run.engine.synchronize(){TAIL}", **ADAM),
    *silence("saved under inference mode", f"attach()\n\n{STEP}\n\nwith torch.inference_mode(): "
             f"note(optimizer_state()['state']); note(net.state_dict()){TAIL}", **ADAM),
    *silence("loaded under inference mode", f"{WARM}\n\nstate = copy.deepcopy(optimizer_state())\n\nahead(3)\n\n"
             f"with torch.inference_mode(): load_optimizer(state){TAIL}", BOTH, True,
             **ADAM),
    *silence("detached under inference mode", f"{WARM}\n\nahead(3)\n\nwith torch.inference_mode(): detach(){TAIL}",
             BOTH, True, **ADAM),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_the_context_of_a_reader_changes_nothing(pool2, case, may_refuse):
    check(pool2, case, may_refuse)
