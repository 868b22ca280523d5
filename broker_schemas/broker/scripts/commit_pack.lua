-- Turns pending descriptors into ready packs; all packs of the call or none.
-- KEYS[3]  matched  stream  group ARGV[2]
-- KEYS[4]  sealed   hash    optimizer step -> number of its packs, for steps that own their packs
-- KEYS[5]  open_step  hash  as in open_step
-- ARGV[2]  group
-- ARGV[3]  oldest policy version that may be trained on
-- ARGV[4]  packs a ready queue may hold; 0: no limit. On overflow the oldest pack is dropped
-- ARGV[5]  optimizer step these packs complete, or -1; with a + behind it they belong to it and more are to come
-- ARGV[6]  number of packs, then for each, from ARGV[7]:
--          rank, pack body, policy version, pack id, number of segments, then entry id and record id of each
-- Reply: {0, record id, ...}: these are no longer pending, nothing is changed;
--        {1, packs made, packs dropped as stale, packs dropped by overflow}.
go_on_at_the_limit()
local group, oldest, limit, num = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])
local step = string.match(ARGV[5], '^-?%d+')
local seals = step ~= '-1' and step == ARGV[5]
if step ~= '-1' then -- said again: sealed, or claimed since, or settled since
  local settled = tonumber(redis.call('HGET', COUNTERS, 'settled_steps') or '0')
  if redis.call('HEXISTS', KEYS[4], step) == 1 or redis.call('EXISTS', PREFIX .. 'claim:' .. step) == 1
    or tonumber(step) < settled then return {1, 0, 0, 0} end
end

local packs, gone, named, pending, taken, at = {}, {0}, {}, {}, {}, 7
for i = 1, num do
  local pack = {rank = ARGV[at], body = ARGV[at + 1], version = ARGV[at + 2], id = ARGV[at + 3], ids = {}}
  local segments = tonumber(ARGV[at + 4])
  at = at + 5
  local last = ARGV[at + 2 * segments - 2]
  if segments > 1 then -- mostly they lie side by side: one look for all
    for _, found in ipairs(redis.call('XPENDING', KEYS[3], group, ARGV[at], last, segments)) do
      pending[found[1]] = true
    end
  end
  for j = 1, segments do
    local entry = ARGV[at]
    if named[entry] or not (pending[entry] or redis.call('XPENDING', KEYS[3], group, entry, entry, 1)[1]) then
      gone[#gone + 1] = ARGV[at + 1]
    end
    named[entry], taken[#taken + 1] = true, entry
    pack.ids[j] = ARGV[at + 1]
    at = at + 2
  end
  packs[i] = pack
end
if #gone > 1 then return gone end

take_off(KEYS[3], group, taken)
local made, made_segments, stale, overflow = 0, 0, 0, 0
for _, pack in ipairs(packs) do
  local ids = table.concat(pack.ids, ' ')
  if tonumber(pack.version) < oldest then
    drop_segments(ids, 'stale', 'packing')
    stale = stale + 1
  else
    local ready = PREFIX .. 'ready:' .. pack.rank
    local entry = redis.call('XADD', ready, '*', 'pack', pack.body, 'version', pack.version, 'ids', ids,
      'id', pack.id, 'step', step)
    redis.call('ZADD', versions_key(pack.rank), pack.version, sortable(entry))
    emit('packed', 'rank', pack.rank, 'pack_id', pack.id, 'policy_version', pack.version, 'ids', ids)
    made, made_segments = made + 1, made_segments + #pack.ids
    if limit > 0 and redis.call('XLEN', ready) > limit then
      local first = redis.call('XRANGE', ready, '-', '+', 'COUNT', 1)[1]
      redis.call('XDEL', ready, first[1])
      redis.call('ZREM', versions_key(pack.rank), sortable(first[1]))
      drop_segments(fields_of(first)['ids'], 'overflow', 'ready')
      overflow = overflow + 1
    end
  end
end
count('packed', made)
count('packed_segments', made_segments)
if step ~= '-1' and not seals and redis.call('HGET', KEYS[5], 'optimizer_step') == step then
  for _, pack in ipairs(packs) do redis.call('HINCRBY', KEYS[5], 'packed_segments', #pack.ids) end
  redis.call('HINCRBY', KEYS[5], 'packed_packs', made)
end
if seals then
  redis.call('HSET', KEYS[4], step, made)
  if redis.call('HGET', KEYS[5], 'optimizer_step') == step then redis.call('HSET', KEYS[5], 'sealed', 1) end
  emit('sealed', 'optimizer_step', step, 'num_packs', made)
end
return {1, made, stale, overflow}
