"""Training on several processes: the ranks of MPI (mpi4py), of torch.distributed (gloo, NCCL), or of CuPy's NCCL.

Every process runs the same program, on a part of the data, and passes its communicator to the optimizer::

    from mpi4py import MPI  # mpiexec -n 8 python -m mpi4py train.py

    world = MPI.COMM_WORLD
    opt = fastopt.AdamW(params, max_norm=1.0, comm=world)
    for epoch in range(10):
        for xb, yb in fastopt.minibatches(X, y, batch_size=64, rng=epoch, part=(world.rank, world.size)):
            opt.step(backward(opt.params, xb, yb), weight=len(xb))  # of the mean over all ranks
        opt.save("run.safetensors")  # one file, which any number of ranks loads

All of them construct the optimizer with the same parameters and options, and call the same methods in the same order.
Before each step they vote: an error on one is an error on all, as are a learning rate or a number of updates that
differ, and nothing is changed then. Results that a step returns are known to every rank; reading them waits for nobody.
An error outside of a step ends one process, and the others wait for it, unless what starts them ends all: use ``python
-m mpi4py``.

With ``shard=True`` (ZeRO-1), each rank holds the states of its part of the parameters: `Optimizer.save`, `load`,
`state_dict` and `swap_ema` then gather them, and every rank calls them. ``opt.states`` and ``opt.ema`` are refused.

`LocalSGD` exchanges once in many steps what the parameters have changed.
"""

from __future__ import annotations

from fastopt.communicators import Communicator, CommunicatorError, communicator_of, run_threads
from fastopt.distributed.local_sgd import LocalSGD

__all__ = ["Communicator", "CommunicatorError", "LocalSGD", "communicator_of", "run_threads"]
