from __future__ import annotations

import subprocess
import sys

import psutil

_PROGRAM = """
import asyncio
from linker_core.text.template_source import TemplateSource, template_variables
from server.rendering.templates import RenderLimits, Templates

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

async def main():
    templates = Templates(limits=RenderLimits(cpu_s=1000.0, wall_s=1000.0, wait_s=1000.0))
    variables = template_variables(
        [], add_generation_prompt=True, bos_token=None, eos_token=None
    )
    await templates.render(TemplateSource.of("fine"), variables)
    endless = asyncio.ensure_future(templates.render(TemplateSource.of(LOOP), variables))
    await templates.render(TemplateSource.of("fine"), variables)
    print("ready", flush=True)
    await endless

asyncio.run(main())
"""


def test_workers_end_with_the_server_however_it_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        workers = psutil.Process(server.pid).children()
        assert len(workers) == 2
        server.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
