"""A plan for people, in tables of 100 columns, and for JSON."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from unclip_jax.measure.report import table, wrapped
from unclip_jax.systems.machines import Machine
from unclip_jax.systems.plan import Settings, StagePlan

_GIB, _MB = 2**30, 1e6


def to_json(
  name: str,
  machine: Machine,
  settings: Settings,
  plans: Sequence[StagePlan],
  price: float | None,
) -> dict[str, Any]:
  """All figures: 'about' the model, the machine and the settings, and 'stages'."""
  chip = machine.chip
  return {
    'about': {
      'model': name,
      'machine': machine.slice.name,
      'num_chips': machine.num_chips,
      'num_devices': machine.num_devices,
      'model_devices': machine.mesh.shape['model'],
      'is_estimate': not machine.is_real,
      **{field: getattr(settings, field) for field in ('fsdp', 'remat', 'accumulate', 'dtype')},
      'price': price,
      'chip': chip._asdict(),
      'sent_per_second': machine.slice.sent_per_second,
      'versions': _versions(machine),
    },
    'stages': [_entry(plan, machine, price) for plan in plans],
  }


def _entry(plan: StagePlan, machine: Machine, price: float | None) -> dict[str, Any]:
  entry = {
    **plan._asdict(),
    'fits': plan.fits,
    'memory': None if plan.memory is None else plan.memory._asdict(),
    'cost': None if plan.cost is None else vars(plan.cost),
    'collectives': None,
    'roofline': None,
  }
  if plan.roofline is not None and plan.collectives is not None:
    least = plan.roofline
    entry['collectives'] = {kind: each._asdict() for kind, each in plan.collectives.items()}
    entry['roofline'] = {**least._asdict(), 'seconds': least.seconds, 'bound': least.bound}
    entry['examples_per_second'] = plan.batch_size / least.seconds
    hours = _chip_hours(plan, machine)
    entry['chip_hours'] = hours
    entry['dollars'] = None if price is None else price * hours
  return entry


def to_text(results: Mapping[str, Any]) -> str:
  """The tables of what `to_json` gives."""
  about, stages = results['about'], results['stages']
  planned = [entry for entry in stages if entry['memory'] is not None]
  is_training = any(entry['num_steps'] is not None for entry in stages)
  parts = [_head(about, is_training), _memory(stages, about['is_estimate'])]
  if planned:
    parts.append(_step(planned, about, 'an update' if is_training else 'a batch'))
    parts.append(_collectives(planned))
    parts.append(_run(planned, about['price'], is_training))
    if not is_training and len(planned) > 1:
      parts.append(_together(planned))
  return '\n\n'.join(filter(None, parts))


def _head(about: Mapping[str, Any], is_training: bool) -> str:
  chip, what = about['chip'], 'training' if is_training else 'sampling'
  names = ('fsdp', 'remat', 'accumulate') if is_training else ()
  speed = chip['exact_flops_per_second' if about['dtype'] == 'float32' else 'flops_per_second']
  lines = [
    f'{what} {about["model"]} on {about["machine"]}: {about["num_chips"]} chips of '
    f'{chip["memory_bytes"] / _GIB:.4g} GiB, {about["dtype"]}',
    'settings  ' + ', '.join(f'{name} {about[name]}' for name in ('model_devices', *names)),
    f'peaks     of a chip: {speed / 1e12:.4g} TFLOP/s, memory '
    f'{chip["bytes_per_second"] / 1e9:.4g} GB/s, links {about["sent_per_second"] / 1e9:.4g} GB/s',
    'versions  ' + ', '.join(f'{name} {version}' for name, version in about['versions'].items()),
  ]
  if chip['devices'] > 1:
    lines.append(f'devices   {chip["devices"]} a chip; what follows is of one of them')
  if about['is_estimate']:
    lines.append(
      'ESTIMATE  a CPU compiled it: products are counted by hand, memory is read or written once, '
      'temporaries (~) are those of the CPU, which computes in float32'
    )
  return '\n'.join(part for line in lines for part in wrapped(line))


def _memory(stages: Sequence[Mapping[str, Any]], is_estimate: bool) -> str:
  about = '~' if is_estimate else ''
  rows = []
  for e in stages:
    memory = e['memory']
    parts = [f'{e["arguments"] / _GIB:.2f}', '', '', '']
    if memory is not None:
      parts = [
        f'{mark}{memory[name] / _GIB:.2f}'
        for name, mark in (
          ('arguments', ''), ('temporaries', about), ('outputs', ''), ('aliased', '')
        )
      ]  # fmt: skip
    rows.append(
      [
        e['stage'],
        str(e['batch_size']),
        f'{e["parameters"] / 1e6:,.1f}',
        *parts,
        f'{about}{e["needed"] / _GIB:.2f}',
        f'{e["available"] / _GIB:.2f}',
        'yes' if e['fits'] else 'NO',
        '' if memory is None else f'{e["compile_seconds"]:,.0f}',
      ]
    )
  names = ['stage', 'batch', 'M params', 'arguments', 'temporary', 'outputs', 'aliased']
  names += ['needed', 'of', 'fits', 'compile s']
  return table('memory of a device, GiB', names, rows)


def _step(planned: Sequence[Mapping[str, Any]], about: Mapping[str, Any], what: str) -> str:
  rows = []
  for e in planned:
    cost, least = e['cost'], e['roofline']
    flops = cost['matmul_flops'] * about['num_devices']
    by_hand = e['analytic_flops']
    rows.append(
      [
        e['stage'],
        f'{cost["matmul_flops"] / 1e9:,.0f}',
        '' if by_hand is None or about['is_estimate'] else f'{flops / by_hand:.3f}',
        f'{cost["bytes"] / 1e9:,.2f}',
        f'{_sent(e) / 1e9:,.3f}',
        *(f'{least[name] * 1e3:,.1f}' for name in ('products', 'memory', 'links')),
        least['bound'],
      ]
    )
  names = ['stage', 'GFLOP', '/ by hand', 'GB', 'GB sent', 'products ms', 'memory ms', 'links ms']
  return table(f'{what}, of a device', [*names, 'bound by'], rows)


def _collectives(planned: Sequence[Mapping[str, Any]]) -> str:
  rows = [
    [e['stage'], kind, f'{each["count"]:,.0f}', f'{each["bytes"] / _MB:,.1f}']
    for e in planned
    for kind, each in e['collectives'].items()
  ]
  return table('what a device sends', ['stage', 'kind', 'times', 'MB'], rows) if rows else ''


def _run(planned: Sequence[Mapping[str, Any]], price: float | None, is_training: bool) -> str:
  rows = []
  for e in planned:
    row = [
      e['stage'],
      f'{e["roofline"]["seconds"] * 1e3:,.1f}',
      f'{e["examples_per_second"]:,.4g}',
      *([f'{e["num_steps"]:,}'] if is_training else []),
      f'{e["chip_hours"]:,.4g}',
      *([] if price is None else [f'{e["dollars"]:,.4g}']),
    ]
    rows.append(row)
  if is_training:
    names, title = ['examples/s', 'iterations', 'chip-hours'], "the paper's run, at the very least"
  else:
    names, title = ['images/s', 'chip-hours'], 'a thousand images, at the very least'
  names += [] if price is None else ['dollars']
  return table(title, ['stage', 'ms', *names], rows)


def _together(planned: Sequence[Mapping[str, Any]]) -> str:
  memories = [e['memory'] for e in planned]
  arguments = sum(m['arguments'] for m in memories)
  between = max(m['temporaries'] + m['outputs'] for m in memories)
  largest = max(e['needed'] for e in planned)
  return (
    f'GiB of a device, one stage at a time (--offload): {largest / _GIB:.2f}; all at once: '
    f'{(arguments + between) / _GIB:.2f}'
  )


def _sent(entry: Mapping[str, Any]) -> float:
  return sum(each['bytes'] for each in entry['collectives'].values())


def _chip_hours(plan: StagePlan, machine: Machine) -> float:
  """Of the paper's iterations, or of a thousand images."""
  runs = 1000 / plan.batch_size if plan.num_steps is None else plan.num_steps
  return runs * plan.roofline.seconds * machine.num_chips / 3600


def _versions(machine: Machine) -> dict[str, str]:
  names = ['unclip-jax', 'jax', *(['libtpu'] if machine.platform == 'tpu' else [])]
  return {name: metadata.version(name) for name in names}
