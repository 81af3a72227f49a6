using System.Globalization;
using System.Numerics;
using System.Text;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Parameters;
using Vmm.Migration.Snapshot;
using Vmm.Migration.Status;

namespace Vmm.Migration.Qmp;

/// <summary>The texts of the human monitor in QEMU 11.1's layout (qmp 10). Lines end in LF; the monitor makes CRLF of it.</summary>
internal static class HumanText
{
    private static readonly CultureInfo s_culture = CultureInfo.InvariantCulture;
    private static readonly string[] s_units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

    internal static string Migrate(MigrationInfo info, bool all, bool onlyMigratable)
    {
        var text = new StringBuilder();
        Body(text, info);
        if (all)
        {
            text.Append("Globals:\n  store-global-state: on\n  only-migratable: ").Append(onlyMigratable ? "on" : "off").Append("\n  send-configuration: on\n  send-section-footer: on\n")
                .Append("  send-switchover-start: on\n  clear-bitmap-shift: 18\n");
            if (info.Xbzrle is { } xbzrle) Xbzrle(text, xbzrle);
        }
        return text.ToString();
    }

    private static void Body(StringBuilder text, MigrationInfo info)
    {
        if (info.BlockedReasons.Count > 0)
        {
            text.Append("Outgoing migration blocked:\n");
            foreach (string reason in info.BlockedReasons) text.Append("  ").Append(reason).Append('\n');
        }
        if (info.Status == MigrationStatus.None) return;
        text.Append("Status: \t\t").Append(info.Status.ToWireName());
        if (info.Error is not null && info.Status is MigrationStatus.Failed or MigrationStatus.Failing) text.Append(s_culture, $" ({info.Error})");
        text.Append('\n');
        bool active = QmpMigrationInfo.IsActive(info.Status);
        if (!info.IsIncoming && (active || info.Status == MigrationStatus.Completed)) Outgoing(text, info, active);
        if (info.IsIncoming && info.Status != MigrationStatus.Completed && info.SocketAddresses.Count > 0)
        {
            text.Append("Sockets: [\n");
            foreach (MigrationAddress a in info.SocketAddresses)
                text.Append('\t').Append(a.Transport == MigrationTransport.Tcp ? string.Create(s_culture, $"tcp:{a.Host}:{a.Port}") : $"unix:{a.Path}").Append('\n');
            text.Append("]\n");
        }
    }

    internal static string Capabilities(MigrationCapabilities set) =>
        string.Concat(Enum.GetValues<MigrationCapability>().Select(c => $"{c.ToWireName()}: {(set.IsOn(c) ? "on" : "off")}\n"));

    internal static string Parameters(MigrationParameters parameters) => string.Concat(MigrationParameterTable.All.Select(p =>
    {
        object value = p.Get(parameters);
        string shown = p.Kind == MigrationParameterKind.StringOrNull && value is string { Length: > 0 } s ? $"'{s}'" : MigrationParameter.Format(value);
        return $"{p.Name}: {shown} {p.Unit}".TrimEnd() + "\n";
    }));

    internal static string Snapshots(IReadOnlyList<SnapshotManifest> list)
    {
        if (list.Count == 0) return "There is no snapshot available.";
        var text = new StringBuilder("List of snapshots present on all disks:\n");
        Row(text, "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
        foreach (SnapshotManifest one in list)
        {
            TimeSpan clock = TimeSpan.FromMilliseconds(one.VmClockNs / 1_000_000);
            string shown = string.Create(s_culture, $"{(long)clock.TotalHours:0000}:{clock.Minutes:00}:{clock.Seconds:00}.{clock.Milliseconds:000}");
            Row(text, "--", one.Name, Size(one.StreamBytes), one.CreatedUtc.LocalDateTime.ToString("yyyy-MM-dd HH:mm:ss", s_culture), shown, "--");
        }
        return text.ToString();
    }

    /// <summary>Three significant digits and a binary unit (QEMU: <c>size_to_str</c>).</summary>
    internal static string Size(long bytes)
    {
        int unit = bytes <= 0 ? 0 : Math.Min(BitOperations.Log2((ulong)(bytes * 1.024)) / 10, 6);
        double value = bytes / Math.Pow(1024, unit);
        return $"{value.ToString("G3", s_culture)} {s_units[unit]}";
    }

    private static void Outgoing(StringBuilder text, MigrationInfo info, bool active)
    {
        text.Append(s_culture, $"Time (ms): \t\ttotal={info.TotalTimeMs}, setup={info.SetupTimeMs}");
        if (active && info.ExpectedDowntimeMs is { } expected) text.Append(s_culture, $", exp_down={expected}");
        if (info.DowntimeMs is { } downtime) text.Append(s_culture, $", down={(long)Math.Round(downtime)}");
        text.Append('\n');
        if (active && info.RemainingBytes is { } remaining) text.Append(s_culture, $"Remaining: \t\t{Size(remaining)}\n");
        if (info.Ram is not { } ram) return;
        text.Append(s_culture, $"RAM info:\n  Throughput (Mbps): \t{ram.Mbps:0.00}\n  Sizes: \t\tpagesize=4 KiB, total={Size(ram.TotalBytes)}\n");
        text.Append(s_culture, $"  Transfers: \t\ttransferred={Size(ram.TransferredBytes)}, remain={Size(active ? ram.RemainingBytes : 0)}\n");
        text.Append(s_culture, $"    Channels: \t\tprecopy={Size(ram.PrecopyBytes)}, multifd={Size(ram.MultifdBytes)}, postcopy=0 B\n");
        text.Append(s_culture, $"    Page Types: \tnormal={ram.NormalPages}, zero={ram.DuplicatePages}\n  Page Rates (pps): \ttransfer={ram.PagesPerSecond}");
        if (active && ram.DirtyPagesRate > 0) text.Append(s_culture, $", dirty={ram.DirtyPagesRate}");
        text.Append(s_culture, $"\n  Others: \t\tdirty_syncs={ram.DirtySyncCount}\n");
        if (info.CpuThrottlePercent is { } percent) text.Append(s_culture, $"CPU Throttle (%): {percent}\n");
    }

    private static void Xbzrle(StringBuilder text, XbzrleStats xbzrle) => text
        .Append(s_culture, $"XBZRLE: size={xbzrle.CacheSizeBytes}, transferred={xbzrle.Bytes}, pages={xbzrle.Pages}, miss={xbzrle.CacheMisses}\n")
        .Append(s_culture, $"  miss_rate={xbzrle.CacheMissRate:0.00}, encode_rate={xbzrle.EncodingRate:0.00}, overflow={xbzrle.Overflows}\n");

    private static void Row(StringBuilder text, string id, string tag, string size, string date, string clock, string icount) =>
        text.Append(s_culture, $"{id,-7} {tag,-16} {size,8} {date,19} {clock,15} {icount,10}\n");
}
