"""A rollout worker that also takes {"damage": name}: one number of that tensor of its engine becomes the next one."""

import torch

from megarl.rollout import worker
from megarl.rollout.witness import weight_in_use


class Damageable(worker.Worker):
    def _handle(self, message):
        if isinstance(message, dict):
            self._carry_out(lambda: self._engine.llm.apply_model(lambda model: damage(model, message["damage"])))
        else:
            super()._handle(message)


@torch.no_grad()
def damage(model, name: str) -> None:
    prefix, _, kind = name.rpartition(".")
    layer = model.get_submodule(prefix)
    tensor = getattr(layer, kind)
    packed = tensor.numel() == 0
    values = (
        weight_in_use(layer, model.config.hidden_size, model.lm_head.weight.dtype) if packed else tensor
    ).flatten()
    values[7] = torch.nextafter(values[7], values[7] + 1)
    if packed:
        layer.weight = torch.nn.Parameter(values.view(-1, model.config.hidden_size), requires_grad=False)
        layer.quant_method.process_weights_after_loading(layer)
    else:
        tensor.copy_(values.view(tensor.shape))


if __name__ == "__main__":
    worker.Worker = Damageable
    worker.main()
