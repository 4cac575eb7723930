#!/bin/bash
# Runs a command on one of many hosts, and starts it again as its exit code says. If one host fails,
# the processes on all others end too (moe/exit_codes.py), so all hosts start again together.
#
#   bash launch/tpu/host.sh .venv/bin/python -m launch.train ...
#
# SIGTERM asks the command to save, and ends.
set -u
max_restarts=10 # in a row; a start that worked for long_start_s begins a new count
backoff_s=${BACKOFF_S-10}
long_start_s=600

stopping=
child=
stop() {
  stopping=1
  [ -z "$child" ] || kill -TERM "$child"
}
trap stop TERM

# Starts a command, and sets `code` to its exit code. A trap ends `wait` early.
run() {
  "$@" &
  child=$!
  [ -z "$stopping" ] || kill -TERM "$child"
  while
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null
  do :; done
  wait "$child"
  code=$?
  child=
}

restarts=0
while :; do
  began=$SECONDS
  run "$@"
  [ -z "$stopping" ] || exit "$code"
  case $code in
    1 | 69 | 74 | 76 | 77 | 13[2-9] | 14[0-24-9] | 1[5-9]? | 2??) ;;
    *) exit "$code" ;; # done, saved after a signal, bad input, or diverged
  esac
  [ $((SECONDS - began)) -lt "$long_start_s" ] || restarts=0
  [ "$restarts" -lt "$max_restarts" ] || exit "$code"
  echo "exit code $code: restart $((restarts + 1)) of $max_restarts in $((backoff_s << restarts)) s"
  run sleep $((backoff_s << restarts))
  [ -z "$stopping" ] || exit 75
  restarts=$((restarts + 1))
  export MOE_RESTART_COUNT=$restarts # the command then waits until the last start has ended
done
