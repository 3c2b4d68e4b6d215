"""The DDP hook that compresses by a method, matrix by matrix, in steps of messages that all matrices send at once."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .messages import Answer, Message
from .method import Exchange, Method
from .naming import Name
from .rounding import ON_THE_WIRE, rounded

SHRINKS = 2  # times in bytes against float32, at least, or a matrix stays dense


class Hook:
    """Its state: a method and an error for each matrix. Errors are this rank's, the rest is the same on every rank."""

    def __init__(self, name: Name, group: dist.ProcessGroup) -> None:
        self.name, self.group = name, group
        self.matrices: dict[Tensor, Matrix | None] = {}  # by parameter; None: sent as it is
        self.step, self.bits = 0, 0.0  # bits: of the last step, one way

    def of_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.index() == 0:
            self.step, self.bits = self.step + 1, 0.0
        exchanges = [self._exchange(*one) for one in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        self._drive(exchanges)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def stats(self) -> dict[str, Any]:
        """Bytes that one rank sends a step by a ring: 2 (P-1)/P of what is sent of a model. Computed."""
        world = self.group.size()
        return {"bytes_sent": int(2 * (world - 1) / world * self.bits / 8)}

    def _exchange(self, parameter: Tensor, gradient: Tensor) -> Generator[Message, Answer, None]:
        """Of one gradient, which becomes the result."""
        if parameter not in self.matrices:
            self.matrices[parameter] = Matrix.of(parameter, self.name, self.group.size())
        matrix = self.matrices[parameter]
        if matrix is None or self.step <= self.name.start:
            bits = self.name.vectors if matrix is None else 32
            self.bits += ON_THE_WIRE[bits] * gradient.numel()
            own = gradient.clone()
            gradient.copy_((yield Message(own, bits)).result)
            if matrix is not None:
                matrix.learn(own, gradient)
        else:
            self.bits += matrix.bits
            gradient.copy_((yield from matrix.exchange(gradient)))

    def _drive(self, exchanges: Sequence[Generator[Message, Answer, None]]) -> None:
        """Lets all go on, message by message."""
        waiting = [(one, next(one)) for one in exchanges]
        while waiting:
            answers = answered([message for _, message in waiting], self.group)
            went_on = []
            for (one, _), answer in zip(waiting, answers, strict=True):
                try:
                    went_on.append((one, one.send(answer)))
                except StopIteration:
                    continue
            waiting = went_on


class Matrix:
    """A parameter that is compressed, seen as [n, m], n <= m."""

    def __init__(self, rows: int, columns: int, name: Name, world: int) -> None:
        self.flipped = rows > columns
        rows, columns = min(rows, columns), max(rows, columns)
        rank = name.rank_of(rows, columns)
        self.method: Method = name.method(rows, columns, rank, world, name.options)
        self.bits = name.method.bits(rows, columns, rank, name.options)
        self.error = torch.zeros(rows, columns)
        self.decay = name.momentum
        self.momentum, self.result = torch.zeros(rows, columns), torch.zeros(rows, columns)  # own, and of all ranks

    @classmethod
    def of(cls, parameter: Tensor, name: Name, world: int) -> "Matrix | None":
        if parameter.dim() < 2:
            return None
        found = cls(parameter.shape[0], parameter.numel() // parameter.shape[0], name, world)
        return found if SHRINKS * found.bits <= 32 * parameter.numel() else None

    def view(self, gradient: Tensor) -> Tensor:
        matrix = gradient.reshape(gradient.shape[0], -1)
        return matrix.T if self.flipped else matrix

    def learn(self, own: Tensor, mean: Tensor) -> None:
        """From a step that was sent exactly."""
        self.method.learn(self.view(mean))
        self.momentum = self.decay * self.momentum + self.view(own)
        self.result = self.decay * self.result + self.view(mean)

    def exchange(self, gradient: Tensor) -> Generator[Message, Answer, Tensor]:
        """Returns what becomes of the gradient.

        With a decay of 0 the method is sent the gradient. Else it is sent this rank's momentum, and what is returned is
        the gradient that makes the result of an optimizer's momentum of the same decay.
        """
        self.momentum = self.decay * self.momentum + self.view(gradient)
        matrix = self.momentum + self.error
        steps: Exchange = self.method.exchange(matrix)
        result, own = yield from steps
        self.error = matrix - own
        before, self.result = self.result, result
        found = result - self.decay * before
        return (found.T if self.flipped else found).reshape(gradient.shape)


def answered(messages: Sequence[Message], group: dist.ProcessGroup) -> list[Answer]:
    """The mean of each over the ranks, by one all-reduce: rounded by every rank, summed exactly, and rounded again."""
    said = [_rounded(one.values, one) for one in messages]
    whole = torch.cat([one.reshape(-1) for one in said])
    dist.all_reduce(whole, group=group)
    whole /= group.size()
    answers = []
    for message, own, mean in zip(messages, said, whole.split([one.numel() for one in said]), strict=True):
        mean = mean.view_as(own)
        result = _rounded(mean, message)
        answers.append(Answer(result, own - (mean - result)))
    return answers


def _rounded(values: Tensor, message: Message) -> Tensor:
    if message.unit is None:
        return rounded(values, message.bits)
    return rounded(values / message.unit, message.bits) * message.unit
