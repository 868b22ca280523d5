-- Frees what a checkpoint covers: claims of earlier steps and the payloads of their packs. A claim that was not
-- committed yet is committed here, with an empty summary.
-- KEYS[3]  claims   zset  as in claim_step
-- KEYS[4]  archive  hash  cursor: id of the last event that is archived with its payloads
-- ARGV[2]  optimizer steps the checkpoint covers: all below this number
-- ARGV[3]  1: only what the archive has passed already
-- ARGV[4]  claims to free in one call
-- Reply: {freed now, still to free}
go_on_at_the_limit()
local NO_SUMMARY = '\128' -- an empty msgpack map
local upto, freed, ids, last = tonumber(ARGV[2]), 0, {}, nil

local function later(left, right)
  local a, b = string.match(left, '^(%d+)-(%d+)$')
  local c, d = string.match(right, '^(%d+)-(%d+)$')
  if a == c then return tonumber(b) > tonumber(d) end
  return tonumber(a) > tonumber(c)
end

if upto > tonumber(redis.call('HGET', COUNTERS, 'covered_steps') or '0') then
  redis.call('HSET', COUNTERS, 'covered_steps', upto) -- what it covers stays as it was trained
end
local cursor = redis.call('HGET', KEYS[4], 'cursor') or '0-0'
local steps = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', '(' .. upto, 'LIMIT', 0, tonumber(ARGV[4]))
for _, step in ipairs(steps) do
  local key = PREFIX .. 'claim:' .. step
  local event = redis.call('HGET', key, 'event')
  if event and ARGV[3] == '1' and later(event, cursor) then break end
  -- a library loop that says nothing until its checkpoint: the checkpoint proves that the step was taken; a claim
  -- that another hand took away leaves nothing to commit or to free, and is nothing to stop for
  if event and redis.call('HSETNX', key, 'committed', 1) == 1 then
    emit('committed', 'optimizer_step', step, 'summary', NO_SUMMARY)
    count('committed_steps', 1)
    count('trained_segments', tonumber(redis.call('HGET', key, 'num_segments')))
  end
  local claim = redis.call('HGETALL', key)
  for i = 1, #claim, 2 do
    if string.sub(claim[i], 1, 4) == 'ids:' then ids[#ids + 1] = claim[i + 1] end
  end
  redis.call('DEL', key)
  redis.call('ZREM', KEYS[3], step)
  freed, last = freed + 1, step
end
if freed > 0 then
  local num = free_payloads(table.concat(ids, ' '))
  redis.call('HSET', COUNTERS, 'settled_steps', last + 1)
  emit('settled', 'optimizer_steps', last + 1, 'num_segments', num)
  count('settled_segments', num)
end
bound_unkept_log()
return {freed, redis.call('ZCOUNT', KEYS[3], '-inf', '(' .. upto)}
