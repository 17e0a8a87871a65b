#!/usr/bin/env bash
# Trains a model like the embedded one, from nothing but this repository, on a CPU:
#
#   experiments/emoji/recipe.sh RUN [STAGE...]
#
# STAGE is one of build clip prior decoder upsampler judge sweep evaluate report; without any, all
# run in this order. The stage ar_prior, which is asked for by name, trains an autoregressive prior
# for the run into RUN/ar_prior, and `evaluate` then compares both; so are build_large, upsampler_1
# and evaluate_upsampler, in this order, which render emoji at 1024 px, train the second upsampler on
# them and measure it. Each is one call that continues where it was stopped. On an accelerator
# PRESET=emoji trains the larger networks on the whole set, with the scripts' own settings. The
# embedded weights came about in more legs than this, by the same scripts: see docs/emoji.md.
set -euo pipefail
run=$(realpath -m "${1:?the folder of the run}")
shift
cd "$(dirname "$0")/../.."
preset=${PRESET:-emoji_small}
data=$run/data
large=$run/data_1024
vectors=(--styles flat noto --groups animals-nature food-drink)
domain=(--preset "$preset")
if [ "$preset" = emoji_small ]; then
  size=128
  domain+=(
    --styles flat 3d
    --groups animals-nature food-drink
    --labels rocket automobile house airplane star sun 'crescent moon' umbrella fire cloud rainbow
    snowman sailboat bus balloon 'wrapped gift' 'soccer ball' basketball trophy droplet
    'high voltage' anchor 'alarm clock' bicycle train helicopter mountain volcano castle tent
    'christmas tree' 'teddy bear' 'heart suit' taxi 'flying saucer' 'ringed planet' snowflake sparkles
    --scene-fraction 0.1
  )
  decay=(--set optimizer.decay=cosine)
  clip=(--steps 1500 --batch-size 128 --pool-size 24576)
  prior=(--steps 2300 --batch-size 64 --pool-size 24576 "${decay[@]}" --jitter 0)
  ar_prior=("${prior[@]}")
  decoder=(
    --steps 20000 --batch-size 32 --pool-size 24576 --draft-steps 6000 --ema-decay 0.999
    --set optimizer.learning_rate=8e-4 --set optimizer.warmup_steps=200 "${decay[@]}" --jitter 0
  )
  upsampler=(
    --steps 2000 --batch-size 32 --pool-size 3072 --ema-decay 0.998
    --set optimizer.learning_rate=8e-4 "${decay[@]}"
  )
  upsampler_1=(
    --steps 2000 --batch-size 16 --pool-size 4096 --ema-decay 0.998 --save-every 250
    --set optimizer.learning_rate=1e-3 "${decay[@]}"
  )
  judge=(--steps 1000 --batch-size 128 --pool-size 16384 --save-every 250)
else
  size=256
  clip=()
  prior=()
  ar_prior=()
  decoder=()
  upsampler=()
  upsampler_1=()
  judge=()
fi

train() { python -m "experiments.emoji.train_$1" "${domain[@]}" "${@:2}"; }

stages=("$@")
[ $# -gt 0 ] || stages=(build clip prior decoder upsampler judge sweep evaluate report)
for stage in "${stages[@]}"; do
  known='build|clip|prior|ar_prior|decoder|upsampler|judge|sweep|evaluate|report'
  [[ $stage =~ ^($known|build_large|upsampler_1|evaluate_upsampler)$ ]] ||
    { echo "recipe.sh: no stage $stage" >&2 && exit 2; }
done
for stage in "${stages[@]}"; do
  case $stage in
    build)
      [ -e "$data/dataset_info.json" ] ||
        python -m experiments.emoji.build --size $size --out "$data"
      ;;
    clip | prior | decoder)
      declare -n own=$stage
      train "$stage" --run "$run" "${own[@]}"
      ;;
    upsampler) train upsampler --run "$run" --data "$data" "${upsampler[@]}" ;;
    ar_prior)
      # The preset is that of the run.
      python -m experiments.emoji.train_ar_prior --init "$run" --run "$run/ar_prior" \
        "${domain[@]:2}" "${ar_prior[@]}"
      ;;
    build_large)
      [ -e "$large/dataset_info.json" ] ||
        python -m experiments.emoji.build --size 1024 --out "$large" "${vectors[@]}"
      ;;
    upsampler_1)
      train_large=(--run "$run" --preset "$preset" --data "$large" --stage 1 "${vectors[@]}")
      python -m experiments.emoji.train_upsampler "${train_large[@]}" "${upsampler_1[@]}"
      ;;
    evaluate_upsampler)
      python -m experiments.emoji.evaluate_upsampler --run "$run" --data "$large" \
        --images "$run/images"
      ;;
    judge) train judge --run "$run/judge" "${judge[@]}" ;;
    sweep | evaluate)
      rival=()
      if [ "$stage" = evaluate ] && [ -e "$run/ar_prior/unclip.json" ]; then
        rival=(--ar-prior "$run/ar_prior")
      fi
      python -m "experiments.emoji.$stage" --run "$run" --judge "$run/judge" \
        --images "$run/images" --data "$data" "${rival[@]}"
      ;;
    report)
      python -m experiments.emoji.report --run "$run" --images "$run/images" --data "$data"
      ;;
  esac
done
