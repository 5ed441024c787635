"""The run that is iterated: what happens between two steps of training, whatever the method.

    run = Run(args, data, folder, state)
    call = run.start(model, optimizer, schedule)     # or goes on where the checkpoint `state` stands
    for epoch in run.epochs():
        for batches in run.steps():                  # of image numbers, `accumulate` of them
            ...                                      # here is the method: backward, optimizer.step()
        run.end_epoch(measured)                      # numbers for this epoch's line of the history

A generator stands still at its yield while the loop's body runs, and goes on when the loop asks for the next
step. So all that a run needs between two steps is written below the yields: the bar, signals, checkpoints. It
also means that THE PROGRAM MAY END THERE: at a signal steps() saves and exits, and the body never sees it.
"""
import json
import time

import torch
from tqdm import tqdm

from .files import atomic_write, atomic_write_text
from .order import shuffled
from .processes import (all_gather_object, all_reduce_max, broadcast, data_parallel, die, end_by_signal,
                        local_slice, noted_signals, on_first_signal, rank, world_size)


class Run:
    """A script's run over data.images, in its folder; state: the checkpoint to go on from, or None.

    order: order(run) -> image numbers of an epoch, as they are in order.py.
    args: batch, accumulate, epochs, seed, device, amp ("off" or "bf16"), compile, save_minutes.
    device, generator   where it computes, and what draws the views there, in each process its own
    step_size, total    images in a step of the optimiser, those of all processes; steps of the whole run
    history             a dict of numbers for each epoch that ended, which metrics.jsonl holds too
    last.pt is written at the start, after each epoch (where a fiftieth of the time pays for it), every
    `save_minutes`, at a signal and at the end; metrics.jsonl after each epoch.
    """

    def __init__(self, args, data, folder, state=None, order=shuffled):
        self.draw_order = order
        self.args = args
        self.folder = folder
        self.state = state
        self.count = len(data.images)
        self.device = torch.device(args.device)
        self.generator = torch.Generator(self.device)                # process 0's also draws the order
        self.generator.manual_seed((args.seed * world_size() + rank()) % 2**63)
        self.step_size = args.batch * args.accumulate
        self.steps_per_epoch = self.count // self.step_size          # the rest is dropped
        self.total = args.epochs * self.steps_per_epoch
        self.cycles = [*state["cycles"]] if state else []            # epochs at which a schedule ends
        if args.epochs not in self.cycles:
            self.cycles.append(args.epochs)
        self.history = []
        self.begin_epoch()

    def begin_epoch(self):
        self.order = None                                            # image numbers, drawn by steps()
        self.done = 0                                                # steps since the epoch began
        self.batches = 0                                             # that were logged since then
        self.sums = {}                                               # of what they logged

    def steps_done(self):
        return len(self.history) * self.steps_per_epoch + self.done

    def rate(self, learning_rate):
        """learning_rate(step, steps, batch) as a function of the step alone. Epochs added to a run that had
        ended, by --resume RUN --epochs N, are a schedule of their own: it rises and falls once more."""
        def factor(step):
            begin = 0
            for epochs in self.cycles:
                end = epochs * self.steps_per_epoch
                if step < end or epochs == self.cycles[-1]:
                    return learning_rate(step - begin, end - begin, self.step_size)
                begin = end
        return factor

    # ---- What a training loop asks for ---------------------------------------------------------------------
    def start(self, model, optimizer, schedule):
        """-> what to call for the model's terms; everything stands where the checkpoint was written."""
        self.model = model
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        if self.state:
            self.restore()
        if self.args.compile:
            # Its own layouts would be channels last for narrow encoders too: see Encoder.
            model.compile(options={"layout_optimization": False})
        return data_parallel(model)

    def epochs(self):
        """Yield the numbers of the epochs that are to come, from 1. After the last one a signal ends it."""
        self.bar = tqdm(total=self.total, initial=self.steps_done(), unit="step", disable=rank() > 0)
        with self.bar, noted_signals() as self.caught:
            self.save()
            while len(self.history) < self.args.epochs:
                yield len(self.history) + 1
        if self.caught:
            end_by_signal(max(self.caught), self.folder)
        on_first_signal(lambda number: end_by_signal(number, self.folder))     # during the report

    def steps(self):
        """Yield for each step numbers of images [accumulate, batch], in the run's order.

        What is left after the last whole step, other images each time, is not seen.
        """
        if self.order is None:
            self.order = broadcast(self.draw_order(self)[:self.steps_per_epoch * self.step_size])
        shape = self.steps_per_epoch, self.args.accumulate, self.args.batch
        for batches in self.order.to(self.device).view(shape)[self.done:]:
            yield batches
            self.done += 1
            self.bar.update()
            if self.bar.n % 10 == 0:
                self.bar.set_postfix(loss=self.loss.item())
            late = time.monotonic() - self.saved > 60 * self.args.save_minutes
            number = max(self.caught, default=0)
            late, number = all_reduce_max([late, number], self.device)         # no process stops alone
            if late or number:
                self.save()
            if number:
                self.bar.close()
                end_by_signal(number, self.folder)
        self.check_finite()                                          # before anybody looks at what it learned

    def own(self, index):
        """Of a batch of image numbers [batch] this process's share, on the CPU, where the images are."""
        return index[local_slice(len(index))].cpu()

    def autocast(self):
        """Mixed precision, if it was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    @property
    def progress(self):
        """Part of the run's batches up to and with the present one: above 0, to 1, where it stays in epochs
        that were added after the run's end. Read it before log()."""
        per_epoch = self.steps_per_epoch * self.args.accumulate
        return min(1, (len(self.history) * per_epoch + self.batches + 1) / (self.cycles[0] * per_epoch))

    def log(self, numbers):
        """A batch's {name: number}, "loss" among them, scalar tensors or not; history has their means."""
        self.batches += 1
        self.loss = torch.as_tensor(numbers["loss"])
        for name, value in numbers.items():
            # Not .item(): no waiting for a GPU. In fp32: a sum in bf16 would soon grow no more.
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach().float()

    def probing(self):
        """Whether this epoch is one of some eight in which to look at the features."""
        return (len(self.history) + 1) % max(1, self.args.epochs // 8) == 0

    def end_epoch(self, measured):
        """Ends an epoch: its means and what was measured are a line of the history; saves."""
        means = {name: value.item() / self.batches for name, value in self.sums.items()}
        self.history.append({"epoch": len(self.history) + 1, **means, **measured})
        self.begin_epoch()
        pays = time.monotonic() - self.saved > 50 * self.cost or len(self.history) == self.args.epochs
        self.save(*all_reduce_max([pays], self.device))              # in all processes or in none

    def check_finite(self):
        """Ends the program if loss or weights are no numbers any more."""
        loss = torch.as_tensor(self.sums.get("loss", 0.))
        if not all(number.isfinite().all() for number in [loss, *self.model.parameters()]):
            self.bar.close()
            die(f"loss or weights are not finite in epoch {len(self.history) + 1}: start anew, with a lower "
                "--lr")

    # ---- Checkpoints ---------------------------------------------------------------------------------------
    def save(self, checkpoint=True):
        """Writes metrics.jsonl and last.pt.

        checkpoint: False leaves last.pt as it is, from which a resumed run writes metrics.jsonl anew.
        RuntimeError if the schedule has not made one step for each of the optimiser's.
        """
        if self.parts["schedule"].last_epoch != self.steps_done():
            raise RuntimeError(f"call schedule.step() after each step: it stands at "
                               f"{self.parts['schedule'].last_epoch}, the run at {self.steps_done()}")
        self.check_finite()
        if checkpoint:
            begun = time.perf_counter()
            self.write_checkpoint()
            self.cost = time.perf_counter() - begun
            self.saved = time.monotonic()
        if not rank():
            lines = [f"{json.dumps(line)}\n" for line in self.history]
            atomic_write_text(self.folder / "metrics.jsonl", "".join(lines))

    def write_checkpoint(self):
        """All that resuming needs, from all processes, into last.pt."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state.update(config=vars(self.args), cycles=self.cycles, history=self.history, order=self.order,
                     done=self.done, sums=self.sums, torch_rng=torch.get_rng_state(),
                     generators=all_gather_object(self.generator.get_state()))
        if not rank():
            with atomic_write(self.folder / "last.pt") as file:
                torch.save(state, file)

    def restore(self):
        """Takes everything from the checkpoint; ends the program if it does not fit."""
        state = self.state
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["torch_rng"])                  # what models themselves draw, on the CPU
            if rank() < len(state["generators"]):
                self.generator.set_state(state["generators"][rank()])
            for name in ("history", "order", "done", "sums"):
                setattr(self, name, state[name])
            self.batches = self.done * self.args.accumulate
            schedule = self.parts["schedule"]
            if self.cycles != state["cycles"]:                       # longer: not the rate of its end
                schedule.last_epoch -= 1
                schedule.step()
            if schedule.last_epoch != self.steps_done():
                raise ValueError(f"steps {self.steps_done()} and {schedule.last_epoch}")
        except Exception as error:                                   # parts missing, of other shapes
            die(f"cannot resume {self.folder}, its last.pt does not fit ({error}): start a new run")
