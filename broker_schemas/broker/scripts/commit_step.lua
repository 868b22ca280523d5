-- Records that an optimizer step was taken; said again (after a resume) it changes nothing.
-- KEYS[3]  claim:<step>  hash  as in claim_step
-- ARGV[2]  optimizer step
-- ARGV[3]  summary (msgpack map): loss and timings
-- Reply: 1 recorded, 0 recorded before or settled already, -1 no such claim: never made, or lost by the broker.
go_on_at_the_limit()
if redis.call('EXISTS', KEYS[3]) == 0 then
  local settled = tonumber(redis.call('HGET', COUNTERS, 'settled_steps') or '0')
  return tonumber(ARGV[2]) < settled and 0 or -1
end
if redis.call('HSETNX', KEYS[3], 'committed', 1) == 0 then return 0 end
emit('committed', 'optimizer_step', ARGV[2], 'summary', ARGV[3])
count('committed_steps', 1)
count('trained_segments', tonumber(redis.call('HGET', KEYS[3], 'num_segments')))
return 1
