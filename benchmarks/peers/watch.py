"""What TRL's trainers tell of their steps. Imports nothing of this project: TRL's interpreters run it."""

from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Starts and steps the meter, and keeps what steps log under a name."""

    def __init__(self, meter, name):
        self.meter, self.name, self.logged = meter, name, []

    def on_train_begin(self, args, state, control, **_):
        self.meter.start()

    def on_step_end(self, args, state, control, **_):
        self.meter.step()

    def on_log(self, args, state, control, logs=None, **_):
        if self.name in logs:
            self.logged.append(logs)
