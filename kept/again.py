"""The second round alone, from a checkpoint: python kept/again.py CHECKPOINT OUT [STEPS]. Features: /tmp/feat-cpu.pt
(torch.save of train.features of pool, whitening, features of validation, seconds), made here where missing."""
import json, logging, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from export.default_model import train as T
from export.default_model.learning import train_decoder as D
from export.default_model.learning.student import Student, Whitening
from export.default_model.learning.pool import Pool
from export.default_model.model import official_names, write_checkpoint

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
if __name__ == "__main__":
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    schedule = T.Schedule()
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else schedule.decoder_again_steps
    saved = Path("/tmp/feat-cpu.pt")
    tower, _ = T.trained_tower(schedule, None, "cpu", Path("kept/tower.pt"))
    if saved.exists():
        seen, white, held, _ = torch.load(saved, weights_only=False)
    else:
        begun = time.time()
        seen, white = T.features(tower, Pool(schedule.decoder_scenes, schedule.seed + 2), None)
        held, _ = T.features(tower, Pool(schedule.validation_scenes, schedule.seed + 900, "validation", vary=False), white)
        torch.save((seen, white, held, time.time() - begun), saved)
    stored = load_file(source / "model.safetensors")
    student, own = Student(), {}
    for name in student.state_dict():
        official = "model.mm_" + name if name.startswith("projector.") else name.split(".", 1)[1]
        if official in stored and not name.startswith("probes"):
            own[name] = stored[official].float()
    left = [n for n in student.state_dict() if n not in own and not n.startswith("probes")]
    print("not in the checkpoint:", left)
    student.load_state_dict(own, strict=False)
    first = student.projector[0]
    with torch.no_grad():  # takes whitened features again
        first.bias.add_(first.weight @ white.mean)
        first.weight.copy_(first.weight @ torch.linalg.inv(white.matrix))
    trainer = D.Bfloat16(student, D.LEARNING_RATE / 2, steps, D.DECAY)
    lessons = D.Lessons(seen.scenes, steps, (D.SCENES, D.QUESTIONS), schedule.seed + 100)
    begun = time.perf_counter()
    for step, means in D._steps(student, trainer, seen, lessons, reads=True, fade=0.0, workers=1, log=min(400, steps)):
        found = D.check(student, held, mode=1)
        text = " ".join(f"{n} {v:.3f}" for n, v in means.items()) + " | " + " ".join(f"{n} {v:.3f}" for n, v in found.items())
        print("decoder", schedule.decoder_steps + step, text, f"{time.perf_counter() - begun:.0f} s", flush=True)
    trainer.restore()
    print(json.dumps(D.check(student, held, mode=1)), json.dumps(D.check(student, held, mode=2)))
    white.fold_into(student)
    write_checkpoint(out, official_names(tower.state_dict(), student.state_dict()))
