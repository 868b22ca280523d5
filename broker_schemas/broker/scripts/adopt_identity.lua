-- Binds the name of a run to one run: the first to come gives its identity, another is told whose it is.
-- KEYS[3]  identity  hash  run_id, deciding (JSON map), settings (JSON map), holder, begun_ms
-- ARGV[2]  run id
-- ARGV[3]  deciding: JSON map of what decides the run's past
-- ARGV[4]  settings: JSON map of what may change while it runs
-- ARGV[5]  holder: where it runs, for people
-- ARGV[6]  optimizer step from which the settings hold
-- ARGV[7]  changes since the settings before, JSON map, for the log; "" for none
-- Reply: {1} it is ours; {0, run id, deciding, holder, begun_ms}: another run or another past, nothing is changed.
go_on_at_the_limit()
local known = redis.call('HMGET', KEYS[3], 'run_id', 'deciding', 'settings', 'holder', 'begun_ms')
if not known[1] then
  redis.call('HSET', KEYS[3], 'run_id', ARGV[2], 'deciding', ARGV[3], 'settings', ARGV[4], 'holder', ARGV[5],
    'begun_ms', now_ms())
  emit('run_adopted', 'run_id', ARGV[2], 'optimizer_step', ARGV[6], 'deciding', ARGV[3], 'settings', ARGV[4])
  return {1}
end
if known[1] ~= ARGV[2] or known[2] ~= ARGV[3] then
  return {0, known[1], known[2], known[4], known[5]}
end
if known[3] ~= ARGV[4] then
  redis.call('HSET', KEYS[3], 'settings', ARGV[4])
  emit('settings_changed', 'optimizer_step', ARGV[6], 'changes', ARGV[7])
end
return {1}
