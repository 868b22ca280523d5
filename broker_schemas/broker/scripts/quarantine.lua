-- Takes segments that cannot be trained out of a claim that no checkpoint covers, for all ranks and for ever.
-- KEYS[3]  claim:<step>  hash    as in claim_step; out:<record id> -> why it was taken out
-- KEYS[4]  rejected      stream  as in commit_match; raw is the payload's first 256 KiB
-- ARGV[2]  optimizer step
-- ARGV[3]  number of records, then record id, reason and detail of each, from ARGV[4]
-- Reply: one text with a status a record, parted by " ":
--   out      taken out, now or before
--   unknown  not in this claim, or a checkpoint covers it
go_on_at_the_limit()
local RAW_KEPT_BYTES = 262144
local step, num = tonumber(ARGV[2]), tonumber(ARGV[3])
local covered = tonumber(redis.call('HGET', COUNTERS, 'covered_steps') or '0')
local claim, place_of = {}, {}
local flat = redis.call('HGETALL', KEYS[3])
for i = 1, #flat, 2 do
  claim[flat[i]] = flat[i + 1]
  if step >= covered and string.sub(flat[i], 1, 4) == 'ids:' then
    for id in string.gmatch(flat[i + 1], '%S+') do place_of[id] = flat[i] end
  end
end

local status, lines, taken, leaving = {}, {}, {}, {}
for i = 1, num do
  local id, reason, detail = ARGV[1 + 3 * i], ARGV[2 + 3 * i], ARGV[3 + 3 * i]
  if claim['out:' .. id] then
    status[i] = 'out'
  elseif place_of[id] then
    status[i] = 'out'
    claim['out:' .. id] = reason
    taken[#taken + 1], lines[#lines + 1] = id, id .. '\t' .. reason
    leaving[id] = true
    redis.call('XADD', KEYS[4], 'MAXLEN', '~', 1000, '*', 'record_id', id, 'reason', reason, 'detail', detail,
      'source', 'claim ' .. step, 'raw', redis.call('GETRANGE', PREFIX .. 'payload:' .. id, 0, RAW_KEPT_BYTES - 1))
    redis.call('HSET', KEYS[3], 'out:' .. id, reason)
    count('rejected:' .. reason, 1)
  else
    status[i] = 'unknown'
  end
end
if #taken == 0 then return table.concat(status, ' ') end

for place, ids in pairs(claim) do
  if string.sub(place, 1, 4) == 'ids:' then
    local staying = {}
    for id in string.gmatch(ids, '%S+') do
      if not leaving[id] then staying[#staying + 1] = id end
    end
    redis.call('HSET', KEYS[3], place, table.concat(staying, ' '))
  end
end
redis.call('HINCRBY', KEYS[3], 'num_segments', -#taken)
if claim['committed'] then count('trained_segments', -#taken) end
free_payloads(table.concat(taken, ' '))
emit('quarantined', 'optimizer_step', step, 'records', table.concat(lines, '\n'))
return table.concat(status, ' ')
