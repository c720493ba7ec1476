# shellcheck shell=bash
# Sourced by env.sh in a batch job: the processes of a run as SLURM steps, and what happens when one of them ends.
#
#   step student     the trainer, one task for each rank, on the nodes of the job or of its first component
#   step teacher-N   a teacher's server, one task for each tensor-parallel rank, on the nodes of the second component
#
# srun starts the ranks themselves, not DeepSpeed's launcher on each node: that one dies of USR1, answers TERM with
# SIGKILL after 30 s, and ends its other ranks as soon as one has left. Tasks get SLURM's signals directly and once, and
# DeepSpeed reads the same variables (task.sh sets them). Steps have names because their numbers are a matter of luck.
#
# Everything here waits in the background: a foreground srun would hold up the traps.

job_id=""      # this job as SLURM's clients take it
job_student="" # process id of the trainer's srun
job_asked=""   # the signal that asked us to stop
job_folder=""  # RUN/job: logs of this start, teacher's configuration and addresses
job_teachers=() job_teacher_names=()
job_fallen="" # what ended the teacher, once no replica is left

_say() { printf 'job %s: %s\n' "$job_id" "$*" >&2; }

# Of an array the task: one task's number is the array's own, and `scontrol requeue` would take it for all of them. SLURM is
# asked, because SLURM_ARRAY_JOB_ID is another job's where sbatch was called in one.
_know_job() {
    job_id="$(squeue -h -j "$SLURM_JOB_ID" -o '%A %i' | awk -v own="$SLURM_JOB_ID" '$1 == own {sub("[+].*", "", $2); print $2; exit}')"
    job_id="${job_id:-$SLURM_JOB_ID}"
}

# Sleep, but let traps run.
_nap() { # SECONDS
    sleep "$1" &
    wait "$!"
}

_on_signal() { # SIGNAL
    [[ -n "$job_asked" ]] || _say "got $1: the run writes a checkpoint and leaves"
    job_asked="$1"
    # Of TERM, too: SLURM may have sent it to this script alone (--signal=B:TERM), and srun would make SIGKILL of it. Where
    # the ranks have got it as well, they are leaving already.
    if [[ -n "$job_student" ]]; then kill -USR1 "$job_student" 2>/dev/null; fi
}

# The exit status of a child of ours: a trapped signal ends `wait` early, and bash keeps what a child ended with.
_status_of() { # PID
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# IPv4 address of a node as the other nodes see it: of the device GRPO_KD_INTERFACE, else the one that SLURM knows.
_address_of() { # NODE GROUP
    local address
    if [[ -n "${GRPO_KD_INTERFACE:-}" ]]; then
        srun --job-name=address "${@:2}" --nodes=1 --ntasks=1 --nodelist="$1" --overlap --input=none \
            ip -o -4 address show dev "$GRPO_KD_INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}'
        return
    fi
    address="$(scontrol show node -o "$1" | grep -o 'NodeAddr=[^ ]*')"
    address="$(getent ahostsv4 "${address#NodeAddr=}" | awk '{print $1; exit}')"
    # A machine's own name is often loopback in its /etc/hosts; only this node can be seen so.
    [[ -n "$address" && "$address" != 127.* ]] || address="$(hostname -I | awk '{print $1}')"
    echo "$address"
}

# Below the range that the kernel hands out; a job has room for 7 teachers beside its student. Not one at which somebody
# answers already.
_port() { # NUMBER ADDRESS
    local port=$((12000 + (SLURM_JOB_ID * 8 + $1) % 20000))
    while timeout 2 bash -c ": <>/dev/tcp/$2/$port" 2>/dev/null; do port=$((12000 + (port - 12000 + 8008) % 20000)); done
    echo "$port"
}

# Ask training/run/job.py where the run is, and prepare its teacher in a heterogeneous job.
_read_settings() { # SCRIPT [ARGUMENT ...]
    local answer pid prepare=()
    ((${SLURM_HET_SIZE:-1} == 1)) || prepare=(--prepare)
    answer="$(mktemp)"
    # shellcheck disable=SC2086 # a prefix of several words
    ${GRPO_KD_CONTAINER:-} bash "$GRPO_KD_ROOT/slurm/task.sh" one training/run/job.py "${prepare[@]}" "$@" >"$answer" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        _nap 0.5
        [[ -z "$job_asked" ]] || { kill "$pid" 2>/dev/null; rm -f "$answer"; return 75; }
    done
    _status_of "$pid" || { local status=$?; rm -f "$answer"; return "$status"; }
    mapfile -t job_settings < <(tail -n 3 "$answer") # folder, name, tensor-parallel size
    rm -f "$answer"
    job_folder="${job_settings[0]}/job"
    mkdir -p "$job_folder" && rm -f "$job_folder"/*.address "$job_folder"/failed-* "$job_folder"/*.log
}

# What comes goes on, and into a file. Where neither has room any more tee ends, and srun would kill its tasks for it.
_keep() { # FILE
    tee "$1"
    exec cat >/dev/null
}

# Start a step in the background: its process id is in $!, its output in our own and in RUN/job/NAME.log. Against what a
# site or the submission may say otherwise, its tasks get our environment, and nobody ends one because another has left
# (rank 0 is the last one: it writes the report). It overlaps with a step that this script may itself be run in.
_start_step() { # NAME KIND NODES(comma) TASKS-PER-NODE ADDRESS PORT [SRUN-FLAG ...] -- SCRIPT [ARGUMENT ...]
    local name="$1" kind="$2" nodes="$3" each="$4" count flags=()
    local address="$5" port="$6"
    shift 6
    while [[ "$1" != -- ]]; do flags+=("$1") && shift; done
    shift
    count="$(tr ',' '\n' <<<"$nodes" | wc -l)"
    # shellcheck disable=SC2086 # lists of words
    MASTER_ADDR="$address" MASTER_PORT="$port" WORLD_SIZE="$((count * each))" LOCAL_WORLD_SIZE="$each" \
        LOCAL_SIZE="$each" GRPO_KD_JOB_FOLDER="$job_folder" PYTHONUNBUFFERED=1 \
        srun --job-name="$name" --nodes="$count" --nodelist="$nodes" --ntasks="$((count * each))" \
        --ntasks-per-node="$each" --input=none --unbuffered --export=ALL --wait=0 --overlap "${flags[@]}" ${GRPO_KD_SRUN:-} \
        ${GRPO_KD_CONTAINER:-} bash "$GRPO_KD_ROOT/slurm/task.sh" "$kind" "$@" \
        > >(trap '' TERM USR1 && _keep "$job_folder/$name.log") 2>&1 &
}

_cpus() { # GROUP-SUFFIX
    local variable="SLURM_CPUS_PER_TASK$1"
    [[ -z "${!variable:-}" ]] || echo "--cpus-per-task=${!variable}"
}

# What --ntasks-per-node says, or --ntasks.
_ranks_of_a_node() { # NODES(comma) GROUP-SUFFIX
    local each="SLURM_NTASKS_PER_NODE$2" all="SLURM_NTASKS$2" commas="${1//[^,]/}"
    echo "${!each:-$(((${!all:-1} + ${#commas}) / (${#commas} + 1)))}" # rounded up
}

# One server for each replica, each on its share of the component's nodes; returns when all of them can be reached.
_start_teachers() {
    local nodes replicas="${GRPO_KD_TEACHER_REPLICAS:-1}" share each i own
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
    share=$((${#nodes[@]} / replicas))
    if ((share * replicas != ${#nodes[@]} || job_settings[2] % share != 0)); then
        _say "error: ${#nodes[@]} teacher nodes for GRPO_KD_TEACHER_REPLICAS=$replicas with" \
            "teacher.tensor_parallel=${job_settings[2]}: nodes must divide by replicas, ranks by nodes of a replica"
        return 2
    fi
    each=$((job_settings[2] / share))
    # Known to this job's processes alone, and on no command line. The teachers take it out of their environment.
    [[ -n "${GRPO_KD_TEACHER_SECRET:-}" ]] || GRPO_KD_TEACHER_SECRET="$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')"
    export GRPO_KD_TEACHER_SECRET
    for ((i = 0; i < replicas; i++)); do
        own="$(IFS=, && echo "${nodes[*]:i * share:share}")"
        local address
        address="$(_address_of "${own%%,*}" --het-group=1)"
        # shellcheck disable=SC2046
        _start_step "teacher-$i" teacher "$own" "$each" "$address" "$(_port $((i + 1)) "$address")" --het-group=1 \
            --kill-on-bad-exit=1 $(_cpus _HET_GROUP_1) -- inference/serve_teacher.py --exit_with_stdin \
            --config "$job_folder/teacher.yaml" --interface "$address" --address_file "$job_folder/teacher-$i.address"
        job_teachers+=("$!") job_teacher_names+=("teacher-$i on $own")
    done
    for ((i = 0; i < replicas; i++)); do
        until [[ -s "$job_folder/teacher-$i.address" ]]; do
            _nap 0.5
            [[ -z "$job_asked" ]] || return 75
            if ! _teachers_left; then
                _say "$job_fallen"
                return "$job_fallen_status"
            fi
        done
        job_address="${job_address:+$job_address,}$(<"$job_folder/teacher-$i.address")"
    done
}

# Whether a teacher is there; says which has ended.
_teachers_left() {
    local i
    for i in "${!job_teachers[@]}"; do
        kill -0 "${job_teachers[i]}" 2>/dev/null && continue
        wait "${job_teachers[i]}"
        job_fallen_status=$?
        job_fallen="teacher component (${job_teacher_names[i]}) ended with exit code $job_fallen_status$(_last_error "teacher-$i")"
        unset "job_teachers[i]"
        ((${#job_teachers[@]} == 0)) || _say "$job_fallen; ${#job_teachers[@]} left"
    done
    ((${#job_teachers[@]} > 0))
}

# The last line of a step's log that speaks of an error; srun's own lines only say that there was one.
_last_error() { # STEP
    local line
    line="$(tr '\r' '\n' <"$job_folder/$1.log" 2>/dev/null | grep -av '^srun: ' |
        grep -aE '(^|[^[:alpha:]])(error|ERROR)|[[:alpha:]]+(Error|Lost|Died|Refused|Exception)\b|Killed|out of memory' | tail -n 1)"
    [[ -z "$line" ]] || printf '; last error: %s' "${line:0:500}"
}

# Wait for the trainer. A teacher that falls is told to it as USR1: checkpoint and leave.
_watch_student() {
    local failed="" told="" notes
    while kill -0 "$job_student" 2>/dev/null; do
        _nap 1
        if [[ -z "$told" && -n "${job_address:-}" ]] && ! _teachers_left; then
            told=1
            _say "$job_fallen; the trainer is told to write a checkpoint and leave"
            kill -USR1 "$job_student" 2>/dev/null
        fi
        # The others of a failed rank may wait for it for ever.
        notes=("$job_folder"/failed-*)
        if [[ -z "$failed" && -f "${notes[0]}" ]]; then failed=$SECONDS; fi
        if [[ -n "$failed" ]] && ((SECONDS - failed > ${GRPO_KD_GRACE_S:-60})); then
            _say "a rank has failed ($(cat "${notes[@]}" | paste -sd ';')), and others are still there: ended"
            kill -TERM "$job_student" 2>/dev/null # for tasks that is SIGKILL
        fi
    done
    wait "$job_student"
}

# When the first component loses its node, SLURM starts that one anew while the others keep what they run. The teacher
# of the start before is deaf to TERM, and holds the processors that the new one needs.
_end_leftovers() {
    local own left
    own="^(${job_id}${SLURM_JOB_ID_HET_GROUP_1:+|$SLURM_JOB_ID_HET_GROUP_1})[.][0-9]"
    for _ in {1..60}; do
        left="$(squeue -s -h -u "$UID" -o %i | grep -E "$own")" || return 0
        _say "ending what is left of the start before: steps ${left//$'\n'/ }"
        # shellcheck disable=SC2086 # a list of steps
        scancel --signal=KILL $left 2>/dev/null # some may have gone meanwhile
        _nap 1
    done
}

# Newer versions of SLURM set it; the trainer leaves in time by itself as well.
_export_end_time() {
    local end
    end="$(squeue -h -j "$job_id" -o %e | head -n 1)"
    [[ "$end" != 20* ]] || { SLURM_JOB_END_TIME="$(date +%s -d "$end")" && export SLURM_JOB_END_TIME; }
}

run_steps() { # SCRIPT [ARGUMENT ...]
    local status nodes address more=() group=() flags suffix=""
    trap '_on_signal USR1' USR1
    trap '_on_signal TERM' TERM
    # A step has its job's memory. Where sbatch was called inside of another job, that one's may be here too, and srun
    # refuses two.
    unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE
    _know_job
    nodes="${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}"
    _say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $nodes${SLURM_JOB_NODELIST_HET_GROUP_1:+, teacher on $SLURM_JOB_NODELIST_HET_GROUP_1}"
    ((${SLURM_RESTART_COUNT:-0} == 0)) || _end_leftovers
    [[ -n "${SLURM_JOB_END_TIME:-}" ]] || _export_end_time
    _read_settings "$@" || { _finish $?; return; }
    job_begun="$(_progress)"
    if ((${SLURM_HET_SIZE:-1} > 1)); then
        suffix=_HET_GROUP_0 group=(--het-group=0)
        _start_teachers || { _finish $?; return; }
        more=(--teacher.address "$job_address")
    fi
    nodes="$(scontrol show hostnames "$nodes" | paste -sd ,)"
    address="$(_address_of "${nodes%%,*}" "${group[@]}")"
    # Without a component of its own the teacher is started by rank 0, and other nodes must reach it.
    [[ "$nodes" != *,* || -n "${job_address:-}" ]] || more=(--teacher.interface "$address")
    flags=("${group[@]}" --kill-on-bad-exit=0)
    [[ -z "$(_cpus "$suffix")" ]] || flags+=("$(_cpus "$suffix")")
    [[ -z "$job_asked" ]] || { _finish 75; return; }
    _start_step student rank "$nodes" "$(_ranks_of_a_node "$nodes" "$suffix")" "$address" "$(_port 0 "$address")" "${flags[@]}" -- "$@" "${more[@]}"
    job_student=$!
    _watch_student
    status=$?
    _finish "$status"
}

# A single process: no step, no folder. A signal asks it to leave; 75 starts it again.
run_alone() { # SCRIPT [ARGUMENT ...]
    local pid="" status
    _know_job
    trap 'job_asked=1; [[ -z "$pid" ]] || kill -TERM "$pid" 2>/dev/null' USR1 TERM
    # shellcheck disable=SC2086 # a prefix of several words
    ${GRPO_KD_CONTAINER:-} bash "$GRPO_KD_ROOT/slurm/task.sh" one "$@" &
    pid=$!
    _status_of "$pid"
    status=$?
    ((status != 75)) || _requeue
    return "$status"
}

# Name of the newest whole checkpoint of the run, if there is one.
_progress() { cat "${job_folder%/job}/checkpoints/latest" 2>/dev/null || echo none; }

# End what is left, say what happened in the log's last lines, and start again where that makes sense.
_finish() { # STATUS
    local status="$1" pid
    for pid in "${job_teachers[@]}"; do kill -TERM "$pid" 2>/dev/null; done # its tasks have nothing to save
    for pid in "${job_teachers[@]}"; do wait "$pid" 2>/dev/null; done
    # It died of USR1 or TERM: asked to leave before it could listen, when nothing was there to be saved.
    # Or a preempted step did not leave within KillWait, and SLURM ended it.
    if ((status == 138 || status == 143)) || { ((status == 137)) && _preempted; } || _lost_by_nccl; then status=75; fi
    [[ -z "$job_fallen" || -z "$job_student" ]] || _say "$job_fallen"
    if ((status == 0)); then
        _say "finished"
    elif ((status != 75)); then
        [[ -z "$job_student" ]] || _say "student component ended with exit code $status$(_last_error student)"
        _say "the job ends with exit code $status"
    else
        _requeue || status=$?
    fi
    return "$status"
}

# NCCL ends a rank that has lost another by SIGABRT, and other ranks wait until they are killed. Where no rank has failed
# otherwise, it was the network between them.
_lost_by_nccl() {
    local notes
    notes="$(cat "$job_folder"/failed-* 2>/dev/null)" && ! grep -qv 'exit code 134$' <<<"$notes"
}

_preempted() { scontrol show job -o "$job_id" | grep -q 'PreemptTime=[0-9]'; }

# Have SLURM start this job again. After GRPO_KD_FRUITLESS starts without a new checkpoint it ends instead.
_requeue() {
    local count=0 file="$job_folder/fruitless" limit="${GRPO_KD_FRUITLESS:-3}" end
    if [[ -n "$job_folder" ]]; then
        [[ "$(_progress)" != "$job_begun" ]] || count=$(($(cat "$file" 2>/dev/null || echo 0) + 1))
        echo "$count" >"$file"
        if ((count >= limit)); then
            echo 0 >"$file"
            _say "stopped: $count starts in a row brought no new checkpoint (latest: $(_progress))$(_last_error student)"
            return 75
        fi
    fi
    # A job that is being cancelled is not RUNNING any more, and must not come back; nor is one that SLURM requeues.
    if [[ "$(squeue -h -j "$job_id" -o %T | head -n 1)" == RUNNING ]]; then
        _say "checkpoint $(_progress); requeued"
        scontrol requeue "$job_id" || { _say "not requeued; submit it again to continue"; return 75; }
    else
        _say "checkpoint $(_progress); SLURM is ending this start"
    fi
    # A script that leaves now would end its job before it is requeued.
    end=$((SECONDS + 600))
    while ((SECONDS < end)); do _nap 5; done
    return 75
}
