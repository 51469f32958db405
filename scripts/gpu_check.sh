#!/usr/bin/env bash
# Tests and measurements for a GPU, in parts that take at most 24 minutes together; docs/gpu-checklist.md says what for.
#   scripts/gpu_check.sh pack [TEXT]    on a machine with access to packages: fills build/gpu, which git ignores
#   scripts/gpu_check.sh PART OUTDIR [NAME ...]    on the GPU's machine: PART is tests, bench, profile, study1 or study2;
#                                       small files go to OUTDIR. NAME ... runs only these jobs: layer_4096, moe_32, ...
#   REHEARSE=1 scripts/gpu_check.sh PART OUTDIR    the same commands at tiny sizes on any machine, into OUTDIR/rehearsal,
#                                       to see that they run
# TEXT is a folder with *.train.*, *.valid.* and *.test.* of one sentence a line, plain or compressed.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
packed=build/gpu

log() { echo "gpu_check.sh: $*" >&2; }

usage() {
    sed -n '2,8s/^# *//p' scripts/gpu_check.sh >&2
    exit 2
}

# The path as seen from the caller's folder.
given() {
    case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac
}

# Collects what a machine without the project's environment needs; build/gpu/peers stays as it is.
pack() {
    local build=${PYTHON:-python3} text=${1:-} new=build/gpu.new split
    if [ -n "$text" ]; then
        text=$(given "$text")
        for split in train valid test; do
            compgen -G "$text/*.$split.*" >/dev/null || {
                log "no $text/*.$split.*: name a folder of text, or none"
                exit 2
            }
        done
    fi
    rm -rf $new && mkdir -p $new/wheels $new/text $packed
    "$build" -m pip wheel -q --no-deps -w $new/wheels antlr4-python3-runtime==4.9.3 # PyPI has no wheel of it
    "$build" -m pip download -q --no-deps -d $new/wheels hydra-core==1.3.7 omegaconf==2.3.1
    "$build" -m pip download -q --no-deps -d $new/wheels --only-binary=:all: --python-version "${GPU_PYTHON:-3.12}" \
        --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 zstandard==0.25.0
    [ -z "$text" ] || cp "$text"/*.train.* "$text"/*.valid.* "$text"/*.test.* $new/text/
    git describe --always --dirty >$new/commit
    rm -rf $packed/wheels $packed/commit
    mv $new/wheels $new/commit $packed/
    if [ -n "$text" ]; then
        rm -rf $packed/text
        mv $new/text $packed/
    fi
    rm -rf $new
    [ -d $packed/peers ] || log "no other implementations in $packed/peers: docs/gpu-checklist.md says how to get them"
    du -sh $packed
}

# Sizes: tokens of a layer, words of a step, of the vocabulary and of a study, ...
tokens=76800 words=307200 vocabulary=793471 square=8192 data=20000000 shard=159658
experts=(4 32 256) many=1024 most=4096 flat=(32 256) hierarchical=256 most_h=4096 small=()
study=(batch.words=32768 training.num_words=36e6 schedule.warmup_steps=200)
if [ -n "${REHEARSE:-}" ]; then
    tokens=256 words=512 vocabulary=3000 square=128 data=20000 shard=2000
    experts=(4 8) many=16 most=32 flat=(4 8) hierarchical=32 most_h=64
    small=(model.width=16 model.expert_hidden=16)
    study=(batch.words=1000 training.num_words=20000 schedule.warmup_steps=20 softmax.num_sampled=64 vocabulary.max_size=2000 "${small[@]}")
fi

# Uses the environment's Python if there is one, else the machine's own with the packed wheels.
python=.venv/bin/python
prepare() {
    # A copy of the tree without its history reads the commit from build/gpu.
    if [ -f $packed/commit ] && ! git cat-file -e "$(sed 's/-dirty//' $packed/commit)" 2>/dev/null; then
        COMMIT=$(cat $packed/commit)
        export COMMIT
    fi
    [ ! -x $python ] || return 0
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || {
        log "there is neither .venv nor $python: run scripts/environment, or name a Python by PYTHON"
        exit 2
    }
    [ -d $packed/wheels ] || {
        log "there is neither .venv nor $packed/wheels: run scripts/gpu_check.sh pack on a machine with access to packages"
        exit 2
    }
    local site=${TMPDIR:-/tmp}/gpu-check-site
    if [ ! -d "$site" ]; then
        rm -rf "$site.new"
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site.new" $packed/wheels/*.whl
        mv "$site.new" "$site"
    fi
    export PYTHONPATH=$site:$PWD
}

# Runs a job with its own time limit, so that a job that hangs takes no time from the others.
within() {
    timeout -k 10 "$@"
}

failed=()
names=()

# Whether this job was asked for.
asked() {
    [[ ${#names[@]} -eq 0 || " ${names[*]} " == *" $1 "* ]]
}

tests() {
    local at_once=()
    ! "$python" -c "import xdist" 2>/dev/null || at_once=(-n 8)
    # With many threads each, the processes would compete for the cores.
    OMP_NUM_THREADS=2 within 180 "$python" -m pytest -q -W default -p no:cacheprovider "${at_once[@]}" tests/gpu 2>&1 |
        tail -n 60 | tee "$out/tests.txt"
}

run() {
    local name=$1 seconds=$2 script=$3
    shift 3
    asked "$name" || return 0
    rm -f "$out/$name.json" # an old result must not be taken for this job's
    within "$seconds" "$python" "scripts/$script" "$@" --json "$out/$name.json" || {
        failed+=("$name ($?)")
        return 0
    }
    [ -f "$out/$name.json" ] || failed+=("$name (nothing measured)")
}

bench() {
    local peers=() words_4096=$((words / 2)) recompute=true
    if [ -d $packed/peers ]; then peers=(--peers $packed/peers); else log "no $packed/peers: other implementations are left out"; fi
    run layer 90 benchmark_layer.py --experts "${experts[@]}" --tokens $tokens --square $square "${peers[@]}"
    run layer_1024 70 benchmark_layer.py --experts $many --tokens $tokens --square $square "${peers[@]}" \
        --layers moe balanced moe_bfloat16 scattermoe scattermoe_float32 --room 4 --rounds 5
    # Two layers of 4 G parameters are in memory at a time; each takes 17 GB in bfloat16 with its gradients.
    run layer_4096 70 benchmark_layer.py --experts $most --tokens $tokens --square $square "${peers[@]}" \
        --layers moe_bfloat16 scattermoe --room 0 --rounds 3
    run training 50 benchmark_training.py --words $words --vocabulary $vocabulary --experts "${flat[@]}" \
        --hierarchical $hierarchical --rounds 5 --overrides "${small[@]}"
    # Weights and gradients of 4 G parameters take 34 GB and 307,200 words about 40 GB, too much for a GPU of 80 GB.
    if asked training_4096 && is_large; then words_4096=$words recompute=false; fi
    run training_4096 70 benchmark_training.py --words $words_4096 --vocabulary $vocabulary --experts \
        --hierarchical $most_h --rounds 5 --overrides optimizer.experts=factored machine.recompute=$recompute "${small[@]}"
    run data 30 benchmark_data.py --words $data
    run evaluation 40 benchmark_evaluation.py --tokens $shard --vocabulary $vocabulary --square $square \
        --overrides "${small[@]}"
}

# Whether the GPU has more than 120 GB.
is_large() {
    within 30 "$python" -c "import sys, torch; sys.exit(torch.cuda.mem_get_info()[1] < 120e9)" 2>/dev/null
}

profile() {
    local recompute=true
    if asked profile_4096_h && is_large; then recompute=false; fi
    run profile_256 45 benchmark_step.py --model moe_256 --words $words --vocabulary $vocabulary --square $square \
        --profile --overrides "${small[@]}"
    run profile_4096_h 50 benchmark_step.py --model moe_4096_h --words $((words / 2)) --vocabulary $vocabulary \
        --square $square --profile --overrides optimizer.experts=factored machine.recompute=$recompute \
        model.num_experts=$most_h "${small[@]}"
    run layer_kernels 25 benchmark_layer.py --experts "${flat[@]}" --tokens $tokens --square $square \
        --layers moe moe_kernels
}

# Trains one model of the study; all models train on equally many words.
train() {
    local name=$1 seconds=$2 runs=${TMPDIR:-/tmp}/gpu-check-runs file
    shift 2
    asked "$name" || return 0
    rm -rf "${runs:?}/$name" "$out/$name.result.json" "$out/$name.metrics.jsonl"
    within "$seconds" "$python" -m moe_lm train "$@" "${study[@]}" name="$name" runs="$runs" corpus=text \
        "corpus.train=$packed/text/*.train.*" "corpus.valid=$packed/text/*.valid.*" "corpus.test=$packed/text/*.test.*" \
        training.log_every=50 training.valid_every=100000 checkpoint.every_seconds=100000 checkpoint.keep_last=1 ||
        failed+=("$name ($?)")
    for file in result.json metrics.jsonl; do
        [ ! -f "$runs/$name/$file" ] || cp "$runs/$name/$file" "$out/$name.$file"
    done
}

study1() {
    train moe_1_wide 120 model=moe_1_wide
    train moe_4 120 model=moe_4
    train moe_32 120 model=moe_32
}

study2() {
    train moe_256 130 model=moe_256
    train moe_4096_h 170 model=moe_4096_h optimizer.experts=factored machine.recompute=true
}

[ $# -ge 1 ] || usage
part=$1
case $part in
pack)
    [ $# -le 2 ] || usage
    pack "${2:-}"
    exit
    ;;
tests) jobs="" ;;
profile) jobs="profile_256 profile_4096_h layer_kernels" ;;
bench) jobs="layer layer_1024 layer_4096 training training_4096 data evaluation" ;;
study1) jobs="moe_1_wide moe_4 moe_32" ;;
study2) jobs="moe_256 moe_4096_h" ;;
*) usage ;;
esac
[ $# -ge 2 ] || usage
names=("${@:3}")
for name in "${names[@]}"; do
    [[ " $jobs " == *" $name "* ]] || {
        log "$part has no job named $name${jobs:+, only $jobs}"
        exit 2
    }
done
case $part in study*)
    compgen -G "$packed/text/*.train.*" >/dev/null || {
        log "no $packed/text/*.train.*: run scripts/gpu_check.sh pack TEXT"
        exit 2
    } ;;
esac
prepare
out=$(given "$2")${REHEARSE:+/rehearsal}
mkdir -p "$out"
$part
[ ${#failed[@]} -eq 0 ] || {
    log "failed, with exit code: ${failed[*]}"
    exit 1
}
