-- Asks for rollouts: opens requests under a lease and moves the data set position, or does neither.
-- KEYS[3]  requests  zset  open request id -> end of its lease, ms of the server's clock
-- KEYS[4]  dispatch  hash  cursor: how many samples have been asked for since the start
-- ARGV[2]  lease_ms
-- ARGV[3]  cursor the caller believes in; ARGV[4]  cursor after this call
-- ARGV[5]  number of requests, then for each, from ARGV[6]:
--          id, spec (JSON), number of records, record ids, purpose, optimizer step, policy version
-- Reply: {1, number opened} or {0, the true cursor}: another dispatcher was faster, nothing is changed.
local cursor = redis.call('HGET', KEYS[4], 'cursor') or '0'
if cursor ~= ARGV[3] then return {0, tonumber(cursor)} end
local lease_end, opened, records = now_ms() + tonumber(ARGV[2]), 0, 0
for i = 0, tonumber(ARGV[5]) - 1 do
  local at = 6 + 7 * i
  local id, num = ARGV[at], tonumber(ARGV[at + 2])
  local key = PREFIX .. 'request:' .. id
  if redis.call('EXISTS', key) == 0 then
    redis.call('HSET', key, 'spec', ARGV[at + 1], 'num_records', num, 'remaining', num,
      'records', ARGV[at + 3], 'attempt', 1, 'purpose', ARGV[at + 4])
    redis.call('ZADD', KEYS[3], lease_end, id)
    emit('requested', 'request_id', id, 'ids', ARGV[at + 3], 'purpose', ARGV[at + 4],
      'optimizer_step', ARGV[at + 5], 'policy_version', ARGV[at + 6])
    opened, records = opened + 1, records + num
  end
end
redis.call('HSET', KEYS[4], 'cursor', ARGV[4])
count('requested', records)
count('open_records', records)
return {1, opened}
