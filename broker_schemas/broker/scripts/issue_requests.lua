-- Asks for rollouts: opens requests and moves the data set position, or does neither.
-- KEYS[3]  requests  zset  open request id -> end of its lease, ms of the server's clock; while no worker has taken
--                          it, when its job is looked for in the queue
-- KEYS[4]  dispatch  hash  cursor: how many samples have been asked for since the start; asked_by: the last call;
--                          stale_after: place in the log up to which stale rollouts were asked for again;
--                          or `evaluation`, the same of the rounds of evaluation, which count apart
-- ARGV[2]  lease_ms
-- ARGV[3]  cursor the caller believes in; ARGV[4]  cursor after this call
-- ARGV[5]  a name for this call, one of its own: said again, after a lost reply, it answers as the first time
-- ARGV[6]  number of requests, then for each, from ARGV[7]:
--          id, spec (JSON), number of records, record ids, purpose (that of the first, ARGV[11], is that of all),
--          optimizer step, policy version;
--          after them, where stale rollouts are among the requests: stale_after the caller believes in, and new
-- Reply: {1, requests of the call} or {0, the true cursor}, where cursor or stale_after differ: another dispatcher was faster, nothing is changed.
local cursor = redis.call('HGET', KEYS[4], 'cursor') or '0'
if cursor == ARGV[4] and redis.call('HGET', KEYS[4], 'asked_by') == ARGV[5] then return {1, tonumber(ARGV[6])} end
if cursor ~= ARGV[3] then return {0, tonumber(cursor)} end
local after_all = 7 + 7 * tonumber(ARGV[6])
local stale_before, stale_after = ARGV[after_all], ARGV[after_all + 1]
if stale_after then
  if (redis.call('HGET', KEYS[4], 'stale_after') or '') ~= stale_before then return {0, tonumber(cursor)} end
  redis.call('HSET', KEYS[4], 'stale_after', stale_after)
end
local lane = lane_of(ARGV[11])
local looked_for_at, records = now_ms() + look_after(ARGV[2]), 0
for i = 0, tonumber(ARGV[6]) - 1 do
  local at = 7 + 7 * i
  local id, num = ARGV[at], tonumber(ARGV[at + 2])
  local key = PREFIX .. 'request:' .. id
  if redis.call('EXISTS', key) == 0 then
    redis.call('HSET', key, 'spec', ARGV[at + 1], 'num_records', num, 'remaining', num,
      'records', ARGV[at + 3], 'attempt', 1, 'purpose', ARGV[at + 4])
    redis.call('ZADD', KEYS[3], looked_for_at, id)
    emit('requested', 'request_id', id, 'ids', ARGV[at + 3], 'purpose', ARGV[at + 4],
      'optimizer_step', ARGV[at + 5], 'policy_version', ARGV[at + 6])
    records = records + num
  end
end
redis.call('HSET', KEYS[4], 'cursor', ARGV[4], 'asked_by', ARGV[5])
count(lane .. 'requested', records)
count(lane .. 'open_records', records)
return {1, tonumber(ARGV[6])}
